# Sourced with $python, $build and $built: refuses a torch without a GPU, builds the CUDA half, unless $built says that it
# is, and puts the package with its libraries on PYTHONPATH, found before the installed one by `python -S`.
"$python" - <<'CHECK'
import sys, torch
if not torch.version.cuda:
    sys.exit(f"torch must be built for CUDA, got {torch.__version__}: pip install torch --index-url https://download.pytorch.org/whl/cu130")
if not torch.cuda.is_available():
    sys.exit("a GPU must be there, got none that torch can use")
print("GPU", torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability(), "torch", torch.__version__)
CHECK

if [ -z "$built" ]; then
  cmake -S . -B $build -G Ninja -DMOERT_CUDA=ON -DMOERT_TESTS=ON -DPython_EXECUTABLE="$(realpath -s "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >$build.log || { cat $build.log; exit 1; }
  cmake --build $build
  rm -rf $build/site && mkdir -p $build/site && cp -r python/moert $build/site/
  rm -f $build/site/moert/*.so
  cmake --install $build --prefix $build/site --component python
fi
export PYTHONPATH=$(realpath $build/site):$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -S -c 'from moert import cuda; assert cuda.is_built(), "moert._cuda must be in the package, got none"'

#!/usr/bin/env bash
# The CUDA half on a GPU: C++ programs, operator tests with device=cuda, compute-sanitizer.  usage: test_gpu.sh PYTHON
set -euo pipefail
python=$1 build=build/cuda
"$python" - <<'CHECK'
import sys, torch
if not torch.version.cuda:
    sys.exit(f"torch must be built for CUDA, got {torch.__version__}: pip install torch --index-url https://download.pytorch.org/whl/cu130")
if not torch.cuda.is_available():
    sys.exit("a GPU must be there, got none that torch can use")
print("GPU", torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability(), "torch", torch.__version__)
CHECK

cmake -S . -B $build -G Ninja -DMOERT_CUDA=ON -DMOERT_TESTS=ON -DPython_EXECUTABLE="$(realpath -s "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >$build.log || { cat $build.log; exit 1; }
cmake --build $build
export MOERT_MUST_RUN=1  # no GPU is a failure, not a skip
ctest --test-dir $build -L gpu --no-tests=error --output-on-failure

# The package with these libraries, found before the installed one.
rm -rf $build/site && mkdir -p $build/site && cp -r python/moert $build/site/
rm -f $build/site/moert/*.so
cmake --install $build --prefix $build/site --component python
export PYTHONPATH=$(realpath $build/site):$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -S -c 'from moert import cuda; assert cuda.is_built(), "moert._cuda must be in the package, got none"'
"$python" -S -m pytest -q -m "gpu" -p no:cacheprovider -rs tests/test_gpu.py

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    for program in $build/tests/cuda/test_gpu_*; do
      [ -x "$program" ] && compute-sanitizer --tool $tool --error-exitcode 1 "$program"
    done
  done
else
  echo "compute-sanitizer is not on the PATH: memcheck and racecheck were left out"
fi

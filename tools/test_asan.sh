#!/usr/bin/env bash
# The C++ tests, and those of operators, routers and packed formats, under the address and undefined-behaviour sanitizers.
# usage: test_asan.sh PYTHON
set -euo pipefail
python=$1 build=build/asan sanitize=address,undefined
mkdir -p build
tests=${TESTS:-tests/ops tests/routers $(echo tests/quant/test_{bit_nested,format,fp8,grid,int4,int8,mxfp4,sub1,ternary}.py) tests/quant/readers}

cmake -S . -B $build -G Ninja -DMOERT_TESTS=ON -DMOERT_CUDA=OFF -DMOERT_SANITIZE=$sanitize \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$(realpath -s "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >$build.log || { cat $build.log; exit 1; }
cmake --build $build
ctest --test-dir $build --output-on-failure

# The package with these libraries, found before the installed one: -S leaves out the editable install's import hook.
rm -rf $build/site && mkdir $build/site && cp -r python/moert $build/site/
rm -f $build/site/moert/*.so
cmake --install $build --prefix $build/site --component python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH=$build/site:$site
# Python itself leaks by design, and torch overrides operator new.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
"$python" -S -c "from moert import _C; assert _C.build()['sanitize'] == '$sanitize', _C.__file__"
# Without torch.compile, whose generated code is not ours.
"$python" -S -m pytest -q -m "not slow and not gpu" -p no:cacheprovider -k "not compile" $tests

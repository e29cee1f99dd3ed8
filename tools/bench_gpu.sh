#!/usr/bin/env bash
# bench/gpu.py with the package that has the CUDA half.  usage: bench_gpu.sh PYTHON [--quick] [--out FILE]
set -euo pipefail
python=$1 build=build/cuda
. tools/gpu_package.sh
"$python" -S bench/gpu.py "${@:2}"

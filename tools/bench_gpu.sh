#!/usr/bin/env bash
# bench/gpu.py with the package that has the CUDA half.  usage: bench_gpu.sh PYTHON [--quick] [--built] [--out FILE]
#   --built  with what build/cuda holds already
set -euo pipefail
python=$1 build=build/cuda built= options=()
for option in "${@:2}"; do
  if [ "$option" = --built ]; then built=1; else options+=("$option"); fi
done
. tools/gpu_package.sh
"$python" -S bench/gpu.py "${options[@]}"

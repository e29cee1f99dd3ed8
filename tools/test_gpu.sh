#!/usr/bin/env bash
# The CUDA half on a GPU: C++ programs, operator tests with device=cuda, compute-sanitizer.
# usage: test_gpu.sh PYTHON [--quick] [--built]
#   --quick  of the operator tests those in bfloat16 and those of no dtype; compute-sanitizer is left out
#   --built  with what build/cuda holds already
set -euo pipefail
python=$1 build=build/cuda quick= built=
for option in "${@:2}"; do
  case $option in
    --quick) quick=1 ;;
    --built) built=1 ;;
    *) echo "options must be --quick or --built, got $option" >&2; exit 2 ;;
  esac
done
. tools/gpu_package.sh

export MOERT_MUST_RUN=1  # no GPU is a failure, not a skip
programs=$(find $build/tests/cuda -maxdepth 1 -name 'test_gpu_*' -perm -u+x | sort)
[ -n "$programs" ] || { echo "$build/tests/cuda must hold the C++ programs, got none" >&2; exit 1; }
for program in $programs; do
  echo "$program"
  "$program"
done
# With the persistent grouped GEMM for Hopper too; the C++ programs ask for it themselves.
for persistent in 0 1; do
  MOERT_PERSISTENT_GEMM=$persistent "$python" -S -m pytest -q -m gpu ${quick:+-k "not torch.float32 and not torch.float16"} \
    -p no:cacheprovider -rs tests/test_gpu.py tests/test_gpu_boundary.py tests/test_gpu_experts.py tests/test_gpu_parallel.py \
    tests/test_gpu_quantized.py \
    tests/test_gpu_run.py tests/integrations/transformers/test_trainer.py
done

if [ -n "$quick" ]; then
  echo "compute-sanitizer was left out: --quick"
elif command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    for program in $programs; do
      compute-sanitizer --tool $tool --error-exitcode 1 "$program"
    done
  done
else
  echo "compute-sanitizer is not on the PATH: memcheck and racecheck were left out"
fi

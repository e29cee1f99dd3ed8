#!/usr/bin/env bash
# The CUDA half on a GPU: C++ programs, operator tests with device=cuda, compute-sanitizer.  usage: test_gpu.sh PYTHON
set -euo pipefail
python=$1 build=build/cuda
. tools/gpu_package.sh

export MOERT_MUST_RUN=1  # no GPU is a failure, not a skip
ctest --test-dir $build -L gpu --no-tests=error --output-on-failure
# With the persistent grouped GEMM for Hopper too; the C++ programs ask for it themselves.
for persistent in 0 1; do
  MOERT_PERSISTENT_GEMM=$persistent "$python" -S -m pytest -q -m "gpu" -p no:cacheprovider -rs tests/test_gpu.py \
    tests/test_gpu_experts.py tests/test_gpu_quantized.py tests/integrations/transformers/test_trainer.py
done

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    for program in $build/tests/cuda/test_gpu_*; do
      [ -x "$program" ] && compute-sanitizer --tool $tool --error-exitcode 1 "$program"
    done
  done
else
  echo "compute-sanitizer is not on the PATH: memcheck and racecheck were left out"
fi

#!/usr/bin/env bash
# One wheel, built once, under the oldest, the default and the newest torch.  usage: test_abi.sh PYTHON
# The torches of the package index are CUDA builds: importing and using the CPU must work without a GPU.
set -euo pipefail
python=$1 root=build/abi
torches=${TORCHES:-2.11.0 2.13.0 newest}

rm -rf $root/wheel
MOERT_CUDA=OFF "$python" -m pip wheel -q --no-deps --no-build-isolation -w $root/wheel .
for torch in $torches; do
  env=$root/torch-$torch
  [ -x $env/bin/python ] || "$python" -m venv $env
  [ $torch = newest ] && wanted=torch || wanted=torch==$torch
  $env/bin/python -m pip install -q -U "$wanted" pytest pytest-timeout pytest-xdist hypothesis expecttest numpy
  $env/bin/python -m pip install -q --no-deps --force-reinstall $root/wheel/*.whl
  rm -rf $root/run && mkdir $root/run && cp -r tests pyproject.toml $root/run/
  (cd $root/run && OMP_WAIT_POLICY=passive ../torch-$torch/bin/python -m pytest -q -n 2 --dist loadfile \
    -m "not slow and not gpu" -p no:cacheprovider \
    tests/test_package.py tests/test_info.py tests/ops)
  $env/bin/python -c "import torch, moert; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'passed with', moert.__file__)"
done

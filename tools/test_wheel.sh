#!/usr/bin/env bash
# The sdist, the wheel made from it, and the tests' core against the installed wheel.  usage: test_wheel.sh PYTHON TORCH
set -euo pipefail
python=$1 torch=$2 out=build/wheel
rm -rf $out && mkdir -p $out

"$python" -c "from scikit_build_core.build import build_sdist; build_sdist('$out')"
TIMEFORMAT='%U %S'
cpu=$( { time MOERT_CUDA=OFF "$python" -m pip wheel -q --no-deps -w $out $out/moert-*.tar.gz >$out/pip.log 2>&1; } 2>&1 ) || { cat $out/pip.log; exit 1; }
wheel=$(ls $out/*.whl)
"$python" - "$wheel" $cpu <<'CHECK'
import os, sys
wheel, seconds, size = sys.argv[1], sum(map(float, sys.argv[2:])), os.path.getsize(sys.argv[1])
print(f"{os.path.basename(wheel)}: {size / 1e6:.2f} MB (5 allowed), built in {seconds:.0f} s of CPU time (240 allowed)")
sys.exit(size > 5e6 or seconds > 240)
CHECK

"$python" -m venv $out/venv
$out/venv/bin/pip install -q $torch
$out/venv/bin/pip install -q "$wheel[test]"
# Away from the sources, so that only the wheel can be imported.
run=$(mktemp -d) && trap 'rm -rf "$run"' EXIT
cp -r tests pyproject.toml "$run"
venv=$(pwd)/$out/venv/bin
cd "$run"
"$venv/python" -c "import moert; assert 'site-packages' in moert.__file__, moert.__file__"
OMP_WAIT_POLICY=passive "$venv/python" -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu and not ranks" -p no:cacheprovider tests/test_package.py tests/test_info.py tests/ops tests/routers
"$venv/moert" info

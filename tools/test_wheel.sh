#!/usr/bin/env bash
# The sdist, the wheel made from it, and the tests' core against the installed wheel.  usage: test_wheel.sh PYTHON TORCH
set -euo pipefail
python=$1 torch=$2 out=build/wheel
rm -rf $out && mkdir -p $out

"$python" -c "from scikit_build_core.build import build_sdist; build_sdist('$out')"
TIMEFORMAT='%U %S'
cpu=$( { time MOERT_CUDA=OFF "$python" -m pip wheel -q --no-deps -w $out $out/moert-*.tar.gz >$out/pip.log 2>&1; } 2>&1 ) || { cat $out/pip.log; exit 1; }
wheel=$(ls $out/*.whl)
"$python" - $out/moert-*.tar.gz "$wheel" $cpu <<'CHECK'
import os, sys
files, seconds = sys.argv[1:3], sum(map(float, sys.argv[3:]))
sizes = [os.path.getsize(file) / 1e6 for file in files]
for file, size in zip(files, sizes):
    print(f"{os.path.basename(file)}: {size:.2f} MB (5 allowed)")
print(f"built in {seconds:.0f} s of CPU time (240 allowed)")
sys.exit(max(sizes) > 5 or seconds > 240)
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

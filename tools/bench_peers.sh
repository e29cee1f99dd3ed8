#!/usr/bin/env bash
# An environment for each family of peers in bench/peers/requirements.txt, under build/peers.  usage: bench_peers.sh PYTHON
# A family that cannot be installed (no wheel for this Python, no compiler) is named, and the others are made.
set -euo pipefail

# shellcheck disable=SC2086  the packages are words
install() { # environment, packages
  "$python" -m venv "$1" && "$1/bin/pip" install -q ${2%% alone *} || return
  case $2 in
    *" alone "*) "$1/bin/pip" install -q --no-deps ${2##* alone } ;;
  esac
}

python=$1
failed=
while IFS=: read -r family packages; do
  env=build/peers/$family
  if [ -x "$env/bin/python" ]; then continue; fi
  rm -rf "$env.new"
  if install "$env.new" "$packages" </dev/null; then
    mv "$env.new" "$env"
    echo "$family: $env"
  else
    failed="$failed $family"
  fi
done < <(grep -v '^#' bench/peers/requirements.txt)
if [ -n "$failed" ]; then
  echo "not made:$failed" >&2
  exit 1
fi

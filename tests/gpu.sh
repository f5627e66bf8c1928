#!/bin/sh
# Runs the GPU tests: tests/gpu.sh [PROGRAM [ARGUMENTS …]], and where no arguments pick some of
# them, the stress run (tests/gpu_stress.sh) of STRESS_SECONDS, default 60. Exit code 77 where there
# is no GPU (ctest: skipped).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-$here/build/gpu_tests}
[ $# -gt 0 ] && shift
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "gpu tests SKIPPED: no NVIDIA GPU on this machine"
  exit 77
fi
nvidia-smi -L
REGRAPH_TEST_DEVICE=cuda "$program" "$@"
[ $# -eq 0 ] || exit 0
STRESS=$(dirname "$program")/gpu_stress
if [ ! -x "$STRESS" ]; then
  echo "stress run SKIPPED: no $STRESS"
  exit 0
fi
export STRESS
exec "$here/tests/gpu_stress.sh" "${STRESS_SECONDS:-60}"

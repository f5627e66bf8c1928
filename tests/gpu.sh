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
# What has kernels for all GPUs since Ampere beside Hopper's: those of 8.0, and of 8.6 where tiles
# for less shared memory are others; whole graphs as an A100 would be given them.
for cc in 80 86; do
  REGRAPH_TEST_DEVICE=cuda REGRAPH_TEST_CC=$cc "$program" \
    --filter '@(attn|attn_exact|delta|topk|wide|gpu_flash|gpu_gather|gpu_attn_long)/*'
done
REGRAPH_TEST_DEVICE=cuda REGRAPH_PROFILE=a100 "$program" --filter '@(bitequal|graph|gpu_random)/*'
STRESS=$(dirname "$program")/gpu_stress
if [ ! -x "$STRESS" ]; then
  echo "stress run SKIPPED: no $STRESS"
  exit 0
fi
export STRESS
exec "$here/tests/gpu_stress.sh" "${STRESS_SECONDS:-60}"

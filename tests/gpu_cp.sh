#!/bin/sh
# Context parallelism on the GPUs of this host, as many as there are: tests/gpu_cp.sh [BUILD-FOLDER]
#
#   one GPU      ranks as threads against one rank's bits, NCCL with one rank in graphs, ranks of
#                several by themselves (gpu_tests gpu_cp/*; bench/cp.py --alone)
#   several      captured collectives by themselves (wires_gpu_bench, where it is built);
#                bench/cp.py, one process a GPU: o and dq against one GPU's bits; a rank that dies,
#                one that sleeps; times at 16K x 8, 128K and 1M tokens; from PyTorch, where that
#                is there: python/tests/cp_ranks.py, also compiled, captured, with DDP and FSDP
#   SEED=PATH    a checkout of the Triton library beside, on as many GPUs (needs torch)
#
# Exit code 77 where there is no GPU (ctest: skipped).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$here/build}
python=${PYTHON:-python3}
n=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$n" -eq 0 ]; then
  echo "gpu_cp SKIPPED: no NVIDIA GPU on this machine"
  exit 77
fi
nvidia-smi -L
REGRAPH_TEST_DEVICE=cuda REGRAPH_SOAK=${REGRAPH_SOAK:-20000} "$build/gpu_tests" --filter 'gpu_cp/*'
export REGRAPH_LIBRARY="$build/libregraph.so"
if [ "$n" -lt 2 ]; then
  echo "several GPUs SKIPPED: there is one; ranks by themselves:"
  "$python" "$here/bench/cp.py" --alone --ranks 1,2,8 --tokens 128K --runs 4
else
  [ ! -x "$build/wires_gpu_bench" ] || "$build/wires_gpu_bench"
  "$python" "$here/bench/cp.py" --check --runs 3 --tokens 16K,128K
  for fate in kill stall; do
    "$python" "$here/bench/cp.py" --$fate 1 --deadline 5 --runs 4 --tokens 128K --ranks 2
  done
  "$python" "$here/bench/cp.py" ${SEED:+--seed "$SEED"}
  if "$python" -c 'import torch' 2>/dev/null; then
    PYTHONPATH="$here/python" "$python" -m torch.distributed.run --standalone \
      --nproc-per-node "$((n < 4 ? n : 4))" "$here/python/tests/cp_ranks.py" equal
  else
    echo "from PyTorch SKIPPED: $python has no torch"
  fi
fi
echo "gpu_cp: passed"

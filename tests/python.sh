#!/usr/bin/env bash
# The Python package's tests against a build: numpy's on the CPU, torch's and the GPU's where those
# are there.
#   tests/python.sh BUILD
# Exits with 77, and says so, where no python3 with numpy is found.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export REGRAPH_LIBRARY=$(cd "$1" && pwd)/libregraph.so PYTHONDONTWRITEBYTECODE=1
for python in python3 /usr/bin/python3; do
  if command -v "$python" >/dev/null && "$python" -c 'import numpy' 2>/dev/null; then
    cd "$root/python"
    "$python" -m unittest -q tests/test_numpy.py tests/test_mistakes.py tests/test_serve.py
    "$python" ../bench/cp.py --device cpu --ranks 1,2 --tokens 2K --runs 2 --check
    "$python" ../bench/compare.py --dry-run --choices all --tokens 4K
    "$python" ../bench/serve.py --dry-run
    if "$python" -c 'import torch, pytest' 2>/dev/null; then
      "$python" -m pytest -q -p no:cacheprovider tests/test_torch.py tests/test_cuda.py \
        tests/test_hf.py tests/test_migrate.py tests/test_megatron.py tests/test_torchtitan.py \
        tests/test_nanovllm.py tests/test_nanovllm_ahead.py \
        tests/test_needles.py
    else
      echo "skipped: tests of torch, CUDA and adapters, since $python has no torch or no pytest"
    fi
    if "$python" -c 'import jax, pytest' 2>/dev/null; then
      "$python" -m pytest -q -p no:cacheprovider tests/test_jax.py \
        tests/test_jax_cuda.py
    else
      echo "skipped: tests/test_jax.py, since $python has no jax or no pytest"
    fi
    exit 0
  fi
done
echo "skipped: the Python package's tests, since no python3 here has numpy (Debian: python3-numpy)"
exit 77

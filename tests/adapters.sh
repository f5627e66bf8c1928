#!/usr/bin/env bash
# The adapters' tests beside the packages they are for (transformers, Megatron-Core, torchtitan,
# JAX), and those of plain PyTorch that start no processes, on the CPU.
#
#   tests/adapters.sh install        makes the environment of python/tests/adapters.txt, once: about
#                                    a minute, 6 GiB in the cache folder. Wants Python 3.12, or 3.13
#   tests/adapters.sh test BUILD     runs the tests with it, in two lanes
#   tests/adapters.sh where          the environment's folder
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
packages=$root/python/tests/adapters.txt
cache=${XDG_CACHE_HOME:-$HOME/.cache}/regraph
home=$cache/adapters-$(sha256sum "$packages" | cut -c1-12)

python() { # 3.12 or 3.13, which may be pyenv's and on no path
  local p
  for p in python3.12 python3.13 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
    if "$p" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$p"
      return 0
    fi
  done
  echo "no Python 3.12 or 3.13 is there" >&2
  return 1
}

install() {
  mkdir -p "$cache"
  exec 9>"$cache/adapters.lock"
  flock 9 # two of these at once: the second finds what the first made
  [ ! -e "$home/done" ] || return 0
  rm -rf "$cache"/adapters-*/ # what an interrupted one left, and other releases'
  if [ "$(df -Pk "$cache" | awk 'NR == 2 { print $4 }')" -lt $((10 << 20)) ]; then
    echo "less than 10 GiB are free in $cache"
    return 1
  fi
  local python
  python=$(python)
  "$python" -m venv "$home/env"
  "$home/env/bin/pip" install -q uv
  "$home/env/bin/uv" pip install -q --cache-dir "$home/packages" --python "$home/env/bin/python" \
    -r "$packages"
  rm -rf "$home/packages"
  touch "$home/done"
}

lane() { # pytest's arguments
  timeout 600 "$home/env/bin/python" -m pytest -q -rs -p no:cacheprovider -W ignore "$@"
}

run_tests() {
  [ -e "$home/done" ] || { echo "tests/adapters.sh install comes first" >&2; return 1; }
  export REGRAPH_LIBRARY=$1/libregraph.so PYTHONPYCACHEPREFIX=$home/compiled
  export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # two lanes, two cores; nothing is fetched
  cd "$root/python"
  local first second status=0
  first=$(mktemp) second=$(mktemp)
  lane tests/test_hf.py tests/test_jax.py tests/test_migrate.py tests/test_torch.py \
    -k "not two_ranks and not context_parallelism and not fresh_process" >"$first" 2>&1 &
  lane tests/test_megatron.py tests/test_torchtitan.py >"$second" 2>&1 || status=1
  wait $! || status=1
  cat "$first" "$second"
  if grep -q "^SKIPPED" "$first" "$second"; then
    echo "an adapter was not tested, though its packages were installed"
    status=1
  fi
  rm -f "$first" "$second"
  return "$status"
}

case ${1:-} in
install) install ;;
test) run_tests "$(cd "$2" && pwd)" ;;
where) echo "$home" ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

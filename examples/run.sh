#!/usr/bin/env bash
# Builds regraph and shows native sparse attention at work: forward, backward, memory, and the
# distance from an fp64 oracle, on this machine's CPU; then, where there is a GPU and nvcc, on that.
# Works from any folder, as often as you like.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build

# ---- what a build needs --------------------------------------------------------------------------
packages=()
command -v cmake >/dev/null || packages+=(cmake)
command -v cc >/dev/null || packages+=(gcc libc6-dev)
command -v make >/dev/null || command -v ninja >/dev/null || packages+=(make)
command -v pkg-config >/dev/null || packages+=(pkg-config)
if ! command -v pkg-config >/dev/null || ! pkg-config --exists jansson; then
  packages+=(libjansson-dev)
fi

if ((${#packages[@]})); then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
    [ -t 0 ] || as_root=(sudo -n)
  fi
  if ! command -v apt-get >/dev/null ||
    { ((${#as_root[@]})) && ! command -v sudo >/dev/null; }; then
    echo "run.sh: these packages are missing and can't be installed from here: ${packages[*]}" >&2
    echo "run.sh: on Debian or Ubuntu: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  echo "installing ${packages[*]}"
  if ! { "${as_root[@]}" apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" \
      apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
    >/dev/null; then
    echo "run.sh: installing failed; please install ${packages[*]} and run this again" >&2
    exit 1
  fi
fi

# ---- build ---------------------------------------------------------------------------------------
options=(-DCMAKE_BUILD_TYPE=Release)
# Kernels take minutes to build: only where something can run them.
gpu=no
if command -v nvcc >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
if [ ! -f "$build/CMakeCache.txt" ] && [ $gpu = no ]; then options+=(-DREGRAPH_CUDA=OFF); fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { cmake -S "$root" -B "$build" "${options[@]}" &&
  cmake --build "$build" --parallel "$(nproc 2>/dev/null || echo 2)" \
    --target regraph_cli regraph-demo; } >"$log" 2>&1; then
  cat "$log" >&2
  echo "run.sh: the build failed" >&2
  exit 1
fi

# ---- show ----------------------------------------------------------------------------------------
"$build/regraph-demo" "$root/examples/nsa.json" "$root/examples/policies/partial.json"

printf '\nThe same from the command line, smaller, and what recomputing would buy:\n'
small=(--set H=16 --set KH=1 --set T=2048 --set B=1)
"$build/regraph" run "$root/examples/nsa.json" "${small[@]}" --backward | sed -n '1,2p'
"$build/regraph" pareto "$root/examples/nsa.json" "${small[@]}"
if [ $gpu = yes ]; then
  printf '\nOn the GPU, 64 heads and 32768 tokens, a CUDA graph a direction:\n'
  "$build/regraph" bench "$root/examples/nsa.json" --set T=32768 --set B=1 --device cuda
fi

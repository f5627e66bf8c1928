#!/bin/bash
# The command on a GPU: runs, wrong flags, too little memory, Ctrl-C. Exit code 77 where there is no
# GPU.   tests/gpu_cli.sh [REGRAPH [SOURCE_DIR]]
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
regraph=${1:-$here/build/regraph} source=${2:-$here}
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "the command's GPU tests SKIPPED: no NVIDIA GPU on this machine"
  exit 77
fi
nsa=$source/examples/nsa.json
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checks=0 failures=0
fail() {
  echo "FAIL: $*" >&2
  failures=$((failures + 1))
}

# expect CODE PATTERN arguments…: exit code, and what stdout (code 0) or stderr (else) must match
expect() {
  local code=$1 pattern=$2 stream=stderr
  shift 2
  checks=$((checks + 1))
  "$regraph" "$@" >"$work/stdout" 2>"$work/stderr"
  local got=$?
  [ "$code" -eq 0 ] && stream=stdout
  [ "$got" -eq "$code" ] ||
    fail "regraph $*: exit $got, expected $code: $(head -c 400 "$work/stderr")"
  grep -Eq -- "$pattern" "$work/$stream" ||
    fail "regraph $*: $stream lacks /$pattern/: $(head -c 400 "$work/$stream")"
  if [ "$code" -ne 0 ] && [ -s "$work/stdout" ]; then
    fail "regraph $*: data on stdout though it failed"
  fi
}

# ---- runs: graph, step by step, and the CPU agree ----
small=(--set H=4 --set KH=2 --set T=500 --set B=3 --set top_n=4 --set window=100)
expect 0 . run "$nsa" "${small[@]}" --device cuda --backward --out "o=$work/graph.npy" \
  --grad-out "q=$work/graph_q.npy"
expect 0 . run "$nsa" "${small[@]}" --device cuda --eager --out "o=$work/eager.npy" \
  --grad-out "q=$work/eager_q.npy"
expect 0 . run "$nsa" "${small[@]}" --device cuda \
  --no-reuse --policy "$source/examples/policies/all.json" \
  --out "o=$work/all.npy" --grad-out "q=$work/all_q.npy"
checks=$((checks + 4))
for other in eager all; do
  for x in "" _q; do
    cmp -s "$work/graph$x.npy" "$work/$other$x.npy" || fail "graph$x and $other$x differ"
  done
done
expect 0 cmp_attn bench "$nsa" "${small[@]}" --device cuda --repeat 3
expect 0 '"device"|"nodes"|"steps"' bench "$nsa" "${small[@]}" --device cuda --eager --repeat 3 \
  --json

# ---- ranks as threads on one GPU: the files of one rank; with more GPUs, a process a rank ----
whole=(--set H=16 --set KH=1 --set T=1536 --set B=2 --device cuda)
expect 0 . run "$nsa" "${whole[@]}" --out "o=$work/one.npy" --grad-out "q=$work/one_q.npy"
for ranks in 2 3; do
  expect 0 "ranks|all_gather" run "$nsa" "${whole[@]}" --cp $ranks --out "o=$work/many.npy" \
    --grad-out "q=$work/many_q.npy"
  for x in "" _q; do
    checks=$((checks + 1))
    cmp -s "$work/one$x.npy" "$work/many$x.npy" || fail "one rank's$x and those of $ranks differ"
  done
done
expect 0 all_gather bench "$nsa" "${whole[@]}" --cp 2 --repeat 2
gpus=$(nvidia-smi -L | grep -c '^GPU')
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
launched() { # as two processes that a launcher started
  local rank
  for rank in 0 1; do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 REGRAPH_MASTER_PORT=$1 "$regraph" \
      run "$nsa" "${whole[@]}" --cp 2 --out "o=$work/gpus.npy" >"$work/gpus.$rank" 2>&1 &
  done
  wait
}
checks=$((checks + 1))
CUDA_VISIBLE_DEVICES=$(cut -d, -f1 <<<"${CUDA_VISIBLE_DEVICES:-0}") launched $((20000 + $$ % 9000))
grep -q 'ranks 0 and 1 are on one GPU' "$work"/gpus.[01] ||
  fail "two processes on one GPU: $(cat "$work"/gpus.[01])"
if [ "$gpus" -gt 1 ]; then
  launched $((21000 + $$ % 9000))
  checks=$((checks + 1))
  cmp -s "$work/one.npy" "$work/gpus.npy" || fail "two GPUs: $(cat "$work"/gpus.[01])"
fi

# ---- mistakes ----
expect 2 "device" run "$nsa" "${small[@]}" --device gpu
expect 2 "device" bench "$nsa" "${small[@]}" --device cuda:1
expect 2 "unknown flag '--egaer'" run "$nsa" "${small[@]}" --device cuda --egaer
expect 2 "repeat" bench "$nsa" "${small[@]}" --device cuda --repeat 0
expect 2 "repeat" bench "$nsa" "${small[@]}" --device cuda --repeat many
expect 2 "threads" run "$nsa" "${small[@]}" --device cuda --threads -1
expect 3 "." run "$nsa" --set H=5 --set KH=2 --set T=500 --set B=1 --device cuda
expect 5 "needed.*free.*largest" run "$nsa" --set T=16777216 --set B=1 --device cuda
expect 5 "needed.*free.*largest" bench "$nsa" --set T=16777216 --set B=1 --device cuda
checks=$((checks + 1))
CUDA_VISIBLE_DEVICES= "$regraph" run "$nsa" "${small[@]}" --device cuda \
  >"$work/stdout" 2>"$work/stderr"
[ $? -eq 5 ] || fail "no device visible: $(head -c 400 "$work/stderr")"

# ---- Ctrl-C while the GPU is busy: over at once, by that signal ----
for command in run bench; do
  checks=$((checks + 1))
  more=()
  [ $command = bench ] && more=(--repeat 100000)
  [ $command = run ] && more=(--backward --set T=262144 --set B=1)
  [ $command = bench ] && more+=(--set T=32768 --set B=1)
  start=$(date +%s%N)
  timeout --preserve-status -s INT -k 5 3 "$regraph" $command "$nsa" --device cuda "${more[@]}" \
    >"$work/stdout" 2>"$work/stderr"
  code=$?
  took=$((($(date +%s%N) - start) / 1000000))
  echo "Ctrl-C in $command after 3000 ms: exit $code after $took ms"
  [ $code -eq 130 ] || [ $command = run -a $code -eq 0 ] ||
    fail "Ctrl-C in $command: exit $code: $(head -c 400 "$work/stderr")"
  [ $took -lt 6000 ] || fail "Ctrl-C in $command took $took ms"
done
expect 0 . run "$nsa" "${small[@]}" --device cuda --no-grad

echo "$checks checks, $failures failed"
[ $failures -eq 0 ]

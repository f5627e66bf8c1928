#!/usr/bin/env bash
# The stress run on the CPU: it covers what it is meant to, finds nothing where nothing is wrong,
# and finds one bit turned over: tests/stress/check.sh GPU_STRESS
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export STRESS=$1
out=$(mktemp -d) failed=0
export LOGS=$out/logs
trap 'rm -rf "$out"' EXIT
expect() { # title, wanted exit code, pattern that the output has, command…
  local title=$1 code=$2 pattern=$3 got
  shift 3
  "$@" >"$out/text" 2>&1
  got=$?
  if [ $got -ne "$code" ] || ! grep -qE -- "$pattern" "$out/text"; then
    echo "FAILED: $title: exit code $got, wanted $code and '$pattern' in"
    tail -n 30 "$out/text"
    failed=1
  fi
}
cpu=(--device cpu --small)

expect "two seconds of three processes" 0 'no bit differs' \
  "$here/tests/gpu_stress.sh" 2 3 "${cpu[@]}"
# The pack is 0, 1, 31, 64 and 80 tokens; the bit is the one in the middle.
expect "a bit turned over" 1 '^  o, bf16 \[176, 2, 64\]: 1 of 22528 elements in 1 rows$' \
  "$STRESS" "${cpu[@]}" --case nsa-16/1-64 --seconds 0.3 --flip 3
expect "its row" 1 \
  '^    row \[88, 0\], position 56 of sequence 3 \(length 64\): 1 elements, 0 … 0; .* was .*, is ' \
  "$STRESS" "${cpu[@]}" --case nsa-16/1-64 --seconds 0.3 --flip 3
expect "as the script shows it" 1 '^dense-8/4-64/128-f16 .* 2 processes .* 1 differ: o 1$' \
  env FIRST='--flip 2 --fresh' "$here/tests/gpu_stress.sh" 0.3 2 "${cpu[@]}" --case dense-8/4
# One run of each case in each process: only between processes can that be seen.
expect "one process that begins wrong" 1 'window-16/16-96 .* 0 differ: o of 1 processes' \
  env FIRST='--flip 0' "$here/tests/gpu_stress.sh" 0 3 "${cpu[@]}" --case window-16/16
expect "a process that fails" 1 'process 0 FAILED' \
  env FIRST='--no-such-option' "$here/tests/gpu_stress.sh" 0 2 "${cpu[@]}" --case window-16/16

# Which kernels a GPU like the H200 would run. A build with few kernel instances has less, and says
# so.
"$STRESS" --list >"$out/list" || failed=1
grep '^left out' "$out/list" && { echo "FAILED: the H200 takes every case"; failed=1; }
covers() { # op, path
  grep -qxF "  $1: $2" "$out/list" || { echo "FAILED: no case has $1 by '$2'"; failed=1; }
}
for op in swa_attn cmp_attn; do
  covers $op wgmma && covers $op.bwd wgmma && covers $op 'plain: f32' && covers $op.bwd 'plain: f32'
done
covers slc_attn 'selected blocks, by queries'
covers slc_attn 'selected blocks, by keys'
covers slc_attn.bwd 'selected blocks, by keys'
covers slc_attn.bwd 'plain: a tensor off 16 bytes'
for op in slc_attn slc_attn.bwd topk; do # a build with few instances leaves these to plain kernels
  grep -qxF "  $op: plain: not in this build" "$out/list" || covers $op 'mma: no wgmma kernel'
done
covers topk wgmma
covers topk 'plain: head width'
for op in slc_attn slc_attn.bwd; do covers $op 'selected tokens, by queries'; done
expect "what a GPU does not take is left out" 0 '^left out dsa-64: heads 576 wide need' \
  env REGRAPH_PROFILE=a100 "$STRESS" --list
grep -qx '  swa_attn: mma: not Hopper' "$out/text" ||
  { echo "FAILED: no case since Ampere"; failed=1; }
for op in compress_kv linear; do covers $op wgmma && covers $op.bwd wgmma; done
exit $failed

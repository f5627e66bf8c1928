#!/bin/bash
# NVIDIA's compute-sanitizer over small cases of every op and mode: tests/gpu_sanitize.sh [PROGRAM
# [PART-OF-A-NAME …]]
#
#   PROGRAM   gpu_tests_plain (default: build/gpu_tests_plain)
#   names     of tests, as the program takes them (default: gpu_tiny)
#   TOOLS     memcheck initcheck synccheck racecheck
#   JOBS      processes side by side, default 8;  SECONDS_EACH  limit of one tool on one test,
#             default 50
#   SHOW      lines of each finding shown, default 25
#   LOGS      where the tools' full output goes, default a temporary directory
#   REGRAPH_TEST_CC=80   the kernels of older GPUs (86: those for less shared memory), of ops alone:
#                        … gpu_tests_plain gpu_tiny/attn topk/groups topk/chunks
#                        attn/selected_joined delta/
#   LANES     the program that racecheck looks at (default: build-lanes/gpu_tests_plain)
#
# One line for each tool and test, then a table. Exit code 1 on any finding, failure or time-out, 77
# where there is no GPU or no compute-sanitizer.
#
# racecheck takes lanes whose accesses __syncwarp orders before lane 0's arrival at an mbarrier for
# unordered (tests/gpu/sanitizer_tma.cu shows it in a few lines), so it is given a build in which
# each lane arrives for itself, and there any finding counts (docs/gpu.md, "Hand-overs"):
#
#   cmake -S . -B build-lanes -DCMAKE_CUDA_FLAGS=-DRGK_EVERY_LANE && cmake --build build-lanes
#
# initcheck takes what the copy engine stores or adds for unwritten (shown there too). round_dq,
# which reads such sums, is not looked at; whole graphs are planned for a GPU without a copy engine.
# That no result depends on what memory held before, test_gpu_random.c shows for all kernels: NaN
# everywhere, same bits.
#
# synccheck asks more than PTX does: that all of the block, not of each warp, come to an aligned
# barrier (bar.sync, __syncthreads) at one place in the code; and that of an mbarrier's phases all
# but the last are waited for (tests/gpu/sanitizer_sync.cu). Kernels keep to that, so any finding
# counts. Where warps meet from several places they do by barrier.sync, which is not aligned.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-$here/build/gpu_tests_plain}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- gpu_tiny
tools=${TOOLS:-memcheck initcheck synccheck racecheck}
lanes=${LANES:-$here/build-lanes/gpu_tests_plain}
export LOGS=${LOGS:-$(mktemp -d)} SECONDS_EACH=${SECONDS_EACH:-50} program lanes
PATH=$PATH:/usr/local/cuda/bin
if ! nvidia-smi -L 2>/dev/null | grep -q GPU || ! command -v compute-sanitizer >/dev/null; then
  echo "sanitizers SKIPPED: no NVIDIA GPU or no compute-sanitizer on this machine"
  exit 77
fi
mkdir -p "$LOGS"
cat >"$LOGS/older.json" <<'PROFILE'
{ "regraph_profile": 1, "name": "older", "device": "cuda", "compute_capability": 80,
  "multiprocessors": 108, "matrix_gflops": { "f32": 19000, "f16": 250000, "bf16": 250000 },
  "special_gops": 2000, "bandwidth_gbs": 1500,
  "step_us": 3, "memory": "40GB", "efficiency": 0.6 }
PROFILE
# Guards and poison would hide what the tools look for: outputs and workspaces start unwritten.
export REGRAPH_TEST_DEVICE=cuda REGRAPH_TEST_RAW=1

one() {
  local tool=$1 name=$2 run=$program log more=() start took found rc verdict
  log=$LOGS/$tool-${name//\//-}.log
  case $tool in
  memcheck) more=(--padding 512) ;;
  initcheck)
    more=(--check-api-memory-access no --kernel-regex-exclude kns=round_dq)
    export REGRAPH_TEST_PROFILE=$LOGS/older.json # whole graphs go by it, ops alone do not
    ;;
  racecheck) run=$lanes more=(--racecheck-report analysis) ;;
  esac
  start=$(date +%s%N)
  timeout -k 2 "$SECONDS_EACH" compute-sanitizer --tool "$tool" "${more[@]}" --show-backtrace no \
    --print-limit 1000 \
    --error-exitcode 33 "$run" "$name" >"$log" 2>&1
  rc=$?
  took=$((($(date +%s%N) - start) / 100000000))
  found=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/^=* *//')
  case $rc in
    0) verdict=clean ;;
    33) verdict=FOUND ;;
    124 | 137) verdict=TIMEOUT ;;
    *) verdict=FAILED ;;
  esac
  grep -q '1 passed, 0 failed' "$log" || [ $verdict = TIMEOUT ] || verdict=FAILED
  if [ $verdict = clean ] && ! grep -qE ' 0 (errors|hazards)' <<<"$found"; then verdict=FOUND; fi
  printf '%-8s %-10s %-34s %3d.%d s  %s\n' "$verdict" "$tool" \
    "$name" $((took / 10)) $((took % 10)) "$found"
  [ $verdict = clean ] || grep -v '^$' "$log" | head -"${SHOW:-25}" | cut -c1-200 | sed 's/^/    /'
  return 0
}
export -f one

names=$("$program" --list "$@") || exit 1
for tool in $tools; do
  [ "$tool" != racecheck ] || [ -x "$lanes" ] || continue # said below
  for name in $names; do echo "$tool $name"; done
done | xargs -P "${JOBS:-8}" -L 1 bash -c 'one "$0" "$1"' | tee "$LOGS/lines"

echo
printf '%-10s %6s %6s %6s\n' tool tests clean bad
bad=0
for tool in $tools; do
  if [ "$tool" = racecheck ] && [ ! -x "$lanes" ]; then
    echo "racecheck SKIPPED: no $lanes"
    continue
  fi
  count() { grep -cE "^$1 +$tool " "$LOGS/lines"; }
  all=$(count '[A-Za-z]+') clean=$(count clean)
  printf '%-10s %6d %6d %6d\n' "$tool" "$all" "$clean" $((all - clean))
  bad=$((bad + all - clean))
done
echo "full output: $LOGS"
[ $bad -eq 0 ]

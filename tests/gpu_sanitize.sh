#!/bin/bash
# NVIDIA's compute-sanitizer over small cases of every op and mode: tests/gpu_sanitize.sh [PROGRAM [PART-OF-A-NAME …]]
#
#   PROGRAM   gpu_tests_plain (default: build/gpu_tests_plain)
#   names     of tests, as the program takes them (default: gpu_tiny)
#   TOOLS     memcheck initcheck synccheck racecheck
#   JOBS      processes side by side, default 8;  SECONDS_EACH  limit of one tool on one test, default 50
#   SHOW      lines of each finding shown, default 25
#   LOGS      where the tools' full output goes, default a temporary directory
#
# One line for each tool and test, then a table. Exit code 1 on any finding, failure or time-out, 77 where
# there is no GPU or no compute-sanitizer.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-$here/build/gpu_tests_plain}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- gpu_tiny
tools=${TOOLS:-memcheck initcheck synccheck racecheck}
export LOGS=${LOGS:-$(mktemp -d)} SECONDS_EACH=${SECONDS_EACH:-50} program
PATH=$PATH:/usr/local/cuda/bin
if ! nvidia-smi -L 2>/dev/null | grep -q GPU || ! command -v compute-sanitizer >/dev/null; then
  echo "sanitizers SKIPPED: no NVIDIA GPU or no compute-sanitizer on this machine"
  exit 77
fi
mkdir -p "$LOGS"
# Blocks of one bound after another would hide a read past the end; outputs and workspaces start unwritten.
export REGRAPH_TEST_DEVICE=cuda REGRAPH_TEST_RAW=1

one() {
  local tool=$1 name=$2 log more=() start found rc
  log=$LOGS/$tool-${name//\//-}.log
  case $tool in
  memcheck) more=(--padding 512) ;;
  initcheck) more=(--check-api-memory-access no) ;;
  racecheck) more=(--racecheck-report all) ;;
  esac
  start=$(date +%s%N)
  timeout -k 2 "$SECONDS_EACH" compute-sanitizer --tool "$tool" "${more[@]}" --print-limit 30 --error-exitcode 33 \
    "$program" "$name" >"$log" 2>&1
  rc=$?
  found=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/^=* *//')
  case $rc in 0) verdict=clean ;; 33) verdict=FOUND ;; 124 | 137) verdict=TIMEOUT ;; *) verdict=FAILED ;; esac
  [ $verdict = clean ] && ! grep -qE ' 0 (errors|hazards)' <<<"$found" && verdict=FOUND
  printf '%-8s %-10s %-34s %6.1f s  %s\n' "$verdict" "$tool" "$name" \
    "$((($(date +%s%N) - start) / 100000000))e-1" "$found"
  [ $verdict = clean ] || grep -vE '^$|passed, 0 failed' "$log" | grep -v 'Host Frame' | head -${SHOW:-25} | cut -c1-200 | sed 's/^/    /'
}
export -f one

names=$("$program" --list "$@") || exit 1
for tool in $tools; do
  for name in $names; do echo "$tool $name"; done
done | xargs -P "${JOBS:-8}" -L 1 bash -c 'one "$0" "$1"' | tee "$LOGS/lines"

echo
printf '%-10s %6s %6s %6s\n' tool tests clean bad
bad=0
for tool in $tools; do
  all=$(grep -c " $tool " "$LOGS/lines") clean=$(grep -c "^clean *$tool " "$LOGS/lines")
  printf '%-10s %6d %6d %6d\n' "$tool" "$all" "$clean" $((all - clean))
  bad=$((bad + all - clean))
done
# What was found, each kind once a kernel.
grep -hE '========= (Invalid|Uninitialized|Barrier|Error:|Warning:|Divergent)|=========     (at|Access|by) ' "$LOGS"/*.log 2>/dev/null |
  sed -E 's/ by thread .*//; s/\+0x[0-9a-f]+.*//; s/0x[0-9a-f]+/ADDR/g' | sort | uniq -c | sort -rn | head -40
echo "full output: $LOGS"
[ $bad -eq 0 ]

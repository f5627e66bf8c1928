#!/usr/bin/env bash
# Many processes at once on one GPU, each walking through all cases of tests/stress, bits compared
# in each and between them: tests/gpu_stress.sh [SECONDS [PROCESSES [ARGUMENTS …]]]
#
#   SECONDS    of each process, or until it has seen every case, default 60;  PROCESSES  default 16
#   ARGUMENTS  for gpu_stress (its head says which): --case PART, --fresh, --dump FOLDER, …
#   STRESS     the program, default build/gpu_stress
#   FIRST      more arguments for the first process alone
#   LOGS       where the processes' output goes; default: a temporary folder, removed if all is well
#
# What differs is printed, then a line for each case: runs, processes, differ, in which tensors.
# Exit code 1 when anything differed or a process failed, 77 where there is no GPU (and no --device
# cpu).
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seconds=${1:-60} processes=${2:-16} program=${STRESS:-$here/build/gpu_stress}
shift $(($# < 2 ? $# : 2))
if [[ " $* " != *" --device cpu "* ]] && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "stress run SKIPPED: no NVIDIA GPU on this machine"
  exit 77
fi
keep=${LOGS:-} logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"

for ((i = 0; i < processes; i++)); do
  more=()
  [ $i -gt 0 ] || read -ra more <<<"${FIRST:-}"
  {
    timeout -k 5 $((${seconds%.*} * 2 + 300)) "$program" --examples "$here/examples" \
      --seconds "$seconds" --order $i "$@" "${more[@]}"
    echo "exit $?"
  } >"$logs/$i" 2>&1 &
done
wait

bad=0
for ((i = 0; i < processes; i++)); do
  quiet='case|exit'
  [ $i -eq 0 ] || quiet+='|left out'
  grep -vE "^($quiet) " "$logs/$i"
  grep -qxE 'exit [01]' "$logs/$i" || { echo "process $i FAILED: $(tail -n 1 "$logs/$i")"; bad=1; }
done
# A tensor's hash in most processes is taken for right; the others began with another result.
for ((i = 0; i < processes; i++)); do cat "$logs/$i"; done | awk '
  $1 != "case" {next}
  !($2 in runs) {names[++n] = $2}
  {
    runs[$2] += $4; differ[$2] += $6; seen[$2]++
    for (i = 7; i <= NF; i++) {
      split($i, x, "[=:]"); key = $2 SUBSEP x[1]
      if (!(key in have)) tensors[$2] = tensors[$2] " " x[1]
      have[key]++; wrong[key] += x[3]
      if (++count[key, x[2]] > most[key]) most[key] = count[key, x[2]]
    }
  }
  END {
    for (k = 1; k <= n; k++) {
      c = names[k]; split("", t); m = split(tensors[c], t, " "); text = ""; others = 0
      for (i = 1; i <= m; i++) {
        odd = have[c, t[i]] - most[c, t[i]]
        if (wrong[c, t[i]]) text = text " " t[i] " " wrong[c, t[i]]
        if (odd) text = text " " t[i] " of " odd " processes"
        others += odd
      }
      printf "%-24s %7d runs %3d processes %6d differ%s%s\n", c, runs[c], seen[c], differ[c],
             text == "" ? "" : ":", text
      all += runs[c]; bad += differ[c] + others
    }
    printf "%-24s %7d runs, %s\n", n " cases", all, bad ? "bits DIFFER" : "no bit differs"
    exit bad > 0 || n == 0
  }' || bad=1
[ $bad -eq 0 ] && [ -z "$keep" ] && rm -r "$logs" || echo "output of each process: $logs"
exit $bad

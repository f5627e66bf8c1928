#!/usr/bin/env bash
# examples/cp_mpi.c under OpenMPI: the same output on 1, 2 and 4 ranks; a rank that dies ends the
# job. And the command under mpirun: the same files, and what ranks say that do not fit together or
# come late. Exit code 77 (skipped) without OpenMPI.
#
#   tests/cp_mpi.sh FOLDER-OF-LIBREGRAPH ROOT REGRAPH
set -euo pipefail
library=$1 root=$2 regraph=$3
command -v mpicc >/dev/null && command -v mpirun >/dev/null ||
  { echo "cp_mpi SKIPPED: no mpicc or mpirun"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if grep -q '__[au][bs]*san_' "$library/libregraph.so"; then
  echo "cp_mpi SKIPPED: the library is instrumented"
  exit 77
fi
mpicc -std=c17 -I "$root/include" -o "$work/cp_mpi" "$root/examples/cp_mpi.c" -L "$library" \
  -lregraph -Wl,-rpath,"$library"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
run=(timeout 120 mpirun --oversubscribe -n)
one=$("${run[@]}" 1 "$work/cp_mpi" "$root/examples/nsa.json" | sed 's/.*: //')
for n in 2 4; do
  more=$("${run[@]}" $n "$work/cp_mpi" "$root/examples/nsa.json" | sed 's/.*: //')
  [ "$one" = "$more" ] || { echo "FAILED: on $n ranks $more, on one $one" >&2 && exit 1; }
done
code=0
"${run[@]}" 4 "$work/cp_mpi" "$root/examples/nsa.json" --die 2 >"$work/log" 2>&1 || code=$?
[ $code -ne 0 ] && [ $code -ne 124 ] ||
  { echo "FAILED: a rank died, the job ended with $code" >&2 && exit 1; }

args=(run "$root/examples/nsa.json" --set T=1024 --set B=3 --set H=4 --set KH=2 --set D=16
  --set DV=16 --threads 1 --cp 4)
"$regraph" "${args[@]}" --out o="$work/threads.npy" >/dev/null
"${run[@]}" 4 "$regraph" "${args[@]}" --out o="$work/processes.npy" >/dev/null
cmp "$work/threads.npy" "$work/processes.npy"

# One has another spec, policy, library or number of ranks: both end, and say so. `apart` lets each
# process end by itself.
apart=(timeout 60 mpirun --oversubscribe --mca orte_abort_on_non_zero_status 0)
two=("$regraph" "${args[@]:0:${#args[@]}-1}" 2 --out o="$work/other.npy")
echo 'const char *rg_version(void); const char *rg_version(void) { return "0.0.0"; }' >"$work/old.c"
cc -shared -fPIC -o "$work/old.so" "$work/old.c"
differs() { # WHAT ALL SAY, what runs as rank 1…
  local say=$1 n
  shift
  "${apart[@]}" -n 1 "${two[@]}" : -n 1 "$@" >"$work/log" 2>&1 || true
  n=$(grep -c "$say" "$work/log" || true)
  [ "$n" -eq 2 ] || { echo "FAILED: $n of 2 say '$say': $(cat "$work/log")" >&2 && exit 1; }
  [ ! -e "$work/other.npy" ] || { echo "FAILED: a file of a failed run" >&2 && exit 1; }
}
differs "rank 1 has another spec than rank 0" "${two[@]}" --set window=77
differs "rank 1 has another policy than rank 0" "${two[@]}" --policy all
differs "rank 1 has another library version than rank 0" env LD_PRELOAD="$work/old.so" "${two[@]}"
differs "rank 1 of 4 came to a meeting of 2 ranks" \
  env OMPI_COMM_WORLD_SIZE=4 "${two[@]}" --cp 4

# One sleeps past the deadline: those who wait end by then, it ends as soon as it comes.
cc -std=gnu17 -Wall -Wextra -Werror -I "$root/include" -o "$work/cp_late" "$root/tests/cp_late.c" \
  -L "$library" -lregraph -Wl,-rpath,"$library"
"${apart[@]}" -n 3 "$work/cp_late" "$root/examples/nsa.json" 0.5 1 1.5 >"$work/log" 2>&1 || true
for rank in 0 1 2; do
  grep -qE "^rank $rank, after [01]\.[0-9] s: rank 1 did not reach [a-z_]+ [^ ]+ within 0.5 s" \
    "$work/log" || { echo "FAILED: one sleeps, rank $rank: $(cat "$work/log")" >&2 && exit 1; }
done
echo "cp_mpi: passed ($one)"

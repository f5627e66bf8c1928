#!/usr/bin/env bash
# examples/cp_mpi.c under OpenMPI: the same output on 1, 2 and 4 ranks; a rank that dies ends the
# job. And the command under mpirun. Exit code 77 (skipped) without OpenMPI.
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

# one has another spec: both end, and say so
two=("$regraph" "${args[@]:0:${#args[@]}-1}" 2 --out o="$work/other.npy")
timeout 120 mpirun --oversubscribe --mca orte_abort_on_non_zero_status 0 -n 1 "${two[@]}" : \
  -n 1 "${two[@]}" --set window=77 >"$work/log" 2>&1 || true
[ "$(grep -c "rank 1 has another spec than rank 0" "$work/log")" -eq 2 ] ||
  { echo "FAILED: another spec: $(cat "$work/log")" >&2 && exit 1; }
[ ! -e "$work/other.npy" ] || { echo "FAILED: a file of a failed run" >&2 && exit 1; }
echo "cp_mpi: passed ($one)"

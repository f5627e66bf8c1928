#!/usr/bin/env bash
# The random tests of the CPU, on and on: CI draws a fixed sample of each (round 0), this goes on
# from there with seeds nobody has seen, until its time is up. Exits with 1 if anything failed, and
# says how to see it again.
#
#   tests/soak.sh [SECONDS [PART…]]     default: 600 seconds, shared evenly by all parts
#
#   graphs     whole plans of random graphs against the fp64 oracle; recomputed, cut, poisoned: the
#              same bits
#   fuse       random branches with and without the fuse pass: the same bits
#   memplan    random graphs planned, played and checked; in place or not: the same bits
#   packing    the packer against brute force
#   recompute  the chooser against brute force
#   offload    budgets that may offload, too, against brute force
#   planner    large graphs: against policies written by hand, and the least budget
#   lowering   launches of random graphs, without a GPU
#   edges      what may run beside what there, copies of what is offloaded, too
#   tables     who owns which tokens, against one token after the other
#   ranks      random specs and batches (200 x 5 numbers of ranks x 3 modes a round), the examples,
#              2^20 rows, on several ranks: the results of one
#   shares     every pack, border, policy and window of the tests on ranks, with other data
#   serving    schedules over pages against the unpaged graph, 40 a round; numbers of all kinds
#   pages      the page allocator beside a model
#   queue      random requests, forks, cancels and failures against each one's run alone
#   fuzz       specs, packings, profiles and what ranks send from libFuzzer, with sanitizers; where
#              there is clang
#
# BUILD=FOLDER uses that build as it is configured (build-asan: with sanitizers); without,
# build-soak is made. ROUND=N starts at round N instead of 1.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
declare -A test=(
  [graphs]="test_graph graph/random_*"
  [fuse]="test_fuse fuse/changes_no_bit_of_random_branches"
  [memplan]="test_memplan_sim memplan_sim/random_graphs memplan_sim/in_place_changes_no_bit"
  [packing]="test_pack pack/brute_force"
  [recompute]="test_recompute recompute/random_graphs"
  [offload]="test_offload_budget offload_budget/*"
  [planner]="test_planner planner/*"
  [lowering]="test_lower_cuda lower_cuda/*_of_random_graphs"
  [edges]="test_lower_edges lower_cuda/*_of_random_graphs"
  [tables]="test_cp_tables cp_tables/random_packs"
  [ranks]="test_cp_random cp_random/*"
  [shares]="test_cp_equal cp_equal/*"
  [serving]="test_serve serve/random_* serve/any_*"
  [pages]="test_pages pages/as_a_model*"
  [queue]="test_queue queue/random_loops"
)
limit=${1:-600}
shift $(($# > 0))
parts=("$@")
[ $# -gt 0 ] ||
  parts=(graphs fuse memplan packing recompute offload planner lowering edges tables ranks shares
    serving pages queue fuzz)
usage() {
  echo "tests/soak.sh: $1; see its first lines" >&2
  exit 2
}
[[ $limit =~ ^[1-9][0-9]*$ ]] || usage "'$limit' is no number of seconds"
for part in "${parts[@]}"; do
  [ "$part" = fuzz ] || [ -n "${test[$part]:-}" ] || usage "there is no part '$part'"
done
jobs=$(nproc 2>/dev/null || echo 2)
share=$(((limit + ${#parts[@]} - 1) / ${#parts[@]}))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

show() { [ ! -t 1 ] || printf '\r\033[K%s' "$1"; }
tell() {
  show ""
  echo "$1"
}
build() { # FOLDER, what to build, -- and cmake options for a fresh one
  local folder=$1 targets=()
  shift
  while [ "$1" != -- ]; do targets+=("$1") && shift; done
  shift
  show "building in $folder"
  [ -f "$folder/CMakeCache.txt" ] || cmake -S . -B "$folder" "$@" >"$work/build" 2>&1 ||
    { cat "$work/build" >&2; exit 1; }
  cmake --build "$folder" --parallel "$jobs" --target "${targets[@]}" >"$work/build" 2>&1 ||
    { tail -n 60 "$work/build" >&2; exit 1; }
}

run_round() { # PART, its number; what it printed stays if it failed
  local words filters=()
  read -ra words <<<"${test[$1]}"
  local status=0 filter
  for filter in "${words[@]:1}"; do
    REGRAPH_ROUND=$2 "$folder/tests/${words[0]}" --color=never -j1 --filter "$filter" >"$work/$2" \
      2>&1 || status=1
    # A filter that fits nothing must not look like success.
    grep -q 'Tested: [1-9]' "$work/$2" || status=1
    if [ $status -ne 0 ]; then
      echo "again: REGRAPH_ROUND=$2 $folder/tests/${words[0]} --filter '$filter'" >>"$work/$2"
      return 1
    fi
  done
  rm -f "$work/$2"
}
soak_rounds() {
  local part=$1 round=${ROUND:-1} end=$((SECONDS + share)) bad=0 i
  while [ $SECONDS -lt $end ] && [ $bad -eq 0 ]; do
    show "$part: round $round, $((end - SECONDS)) s left"
    local pids=()
    for ((i = 0; i < jobs; i++)); do run_round "$part" $((round + i)) & pids+=($!); done
    for ((i = 0; i < jobs; i++)); do
      wait "${pids[i]}" || { bad=1 && tell "FAILED: $part, round $((round + i))" &&
        cat "$work/$((round + i))"; }
    done
    round=$((round + jobs))
  done
  tell "$part: rounds ${ROUND:-1} to $((round - 1)) $([ $bad -eq 0 ] && echo passed ||
    echo "hold a failure")"
  return $bad
}
soak_fuzz() {
  command -v clang >/dev/null || { tell "fuzz: skipped, no clang" && return 0; }
  build build-fuzz fuzz_spec fuzz_pack fuzz_profile fuzz_hub -- -DCMAKE_C_COMPILER=clang \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DREGRAPH_CUDA=OFF \
    -DREGRAPH_FUZZ=ON "-DREGRAPH_SANITIZE=address,undefined"
  local what bad=0
  for what in spec pack profile hub; do
    show "fuzz: $what, $((share / 4 + 1)) s"
    mkdir -p "$work/corpus_$what"
    if (cd "$work" && "$root/build-fuzz/fuzz_$what" -max_total_time=$((share / 4 + 1)) \
      -seed="${ROUND:-1}" -print_final_stats=1 "$work/corpus_$what" \
      "$root/tests/fuzz/corpus/$what") >"$work/fuzz" 2>&1; then
      tell "fuzz: $what, $(sed -n 's/.*executed_units: *//p' "$work/fuzz") inputs passed"
    else
      bad=1
      tell "FAILED: fuzz: $what"
      tail -n 40 "$work/fuzz"
      for input in "$work"/crash-* "$work"/leak-* "$work"/timeout-* "$work"/oom-*; do
        [ ! -e "$input" ] || { cp "$input" build-fuzz/ &&
          echo "kept: build-fuzz/$(basename "$input")"; }
      done
    fi
  done
  return $bad
}

folder=${BUILD:-build-soak}
targets=()
for part in "${parts[@]}"; do [ "$part" = fuzz ] || targets+=("${test[$part]%% *}"); done
[ ${#targets[@]} -eq 0 ] ||
  build "$folder" "${targets[@]}" -- -DCMAKE_BUILD_TYPE=Release -DREGRAPH_CUDA=OFF \
    -DREGRAPH_TESTS=ON
for part in "${parts[@]}"; do
  if [ "$part" = fuzz ]; then soak_fuzz || failed=1; else soak_rounds "$part" || failed=1; fi
done
[ $failed -eq 0 ] && echo "soak: passed" || echo "soak: FAILED"
exit $failed

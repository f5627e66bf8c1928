#!/usr/bin/env bash
# Context parallelism on this machine's cores: NSA on four ranks that are threads. Prints who owns
# what and how it balances, what travels, and that the results are those of one rank.
#
#   examples/cp.sh [REGRAPH]      the command, by default build/regraph
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
regraph=${1:-$root/build/regraph}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ranks=4
spec=("$root/examples/nsa.json" --set H=8 --set KH=2 --set D=64 --set DV=64 --set T=2048 --set B=3
  --set dtype=f32)

echo "== what a rank has, and what travels"
"$regraph" plan "${spec[@]}" --cp $ranks >"$work/plan"
sed -n '/^capacity/,/^nodes/{/^nodes/!p}' "$work/plan"
sed -n '/^ranks/,/on the wire/p' "$work/plan"

echo
echo "== the results of $ranks ranks beside those of one"
for n in 1 $ranks; do
  "$regraph" run "${spec[@]}" --cp $n --out o="$work/o$n.npy" --grad-out q="$work/q$n.npy" \
    --grad-out gate="$work/gate$n.npy" >"$work/run$n"
done
for what in o q gate; do
  cmp "$work/${what}1.npy" "$work/$what$ranks.npy" && echo "$what: the same, to the bit"
done
sed -n '/^result/,$p' "$work/run$ranks"

#!/usr/bin/env bash
# Mistakes that newcomers make, tried as they make them, and what the command says: word for word in
# tests/golden/cli/mistakes.txt, which is worth reading. With RG_GOLDEN_UPDATE set that file is
# rewritten, and the test still fails: look at the difference, run again.
#   tests/cli/mistakes.sh REGRAPH SOURCE_DIR
set -uo pipefail
regraph=$(realpath "$1")
source=$(cd "$2" && pwd)
golden=$source/tests/golden/cli/mistakes.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
exec 3>&1 >said.txt

count=0
try() { # try "WHAT IS WRONG" arguments…
  echo "# $1"
  shift
  echo "\$ regraph $*"
  # what a machine lacks for a GPU differs from one to the next
  CUDA_VISIBLE_DEVICES='' "$regraph" "$@" 2>&1 >/dev/null </dev/null |
    sed 's/\(RG_E_DEVICE\): .*/\1/'
  echo "exit ${PIPESTATUS[0]}"
  echo
  count=$((count + 1))
}
spec() { # spec NAME SED-SCRIPT: the example with a mistake in it
  sed "$2" "$source/examples/nsa.json" >"$1"
}
cp "$source/examples/nsa.json" .
cp "$source/examples/policies/all.json" .

spec comma.json 's/"stride": 16,/"stride": 16,,/'
try 'a comma too many' check comma.json
spec brace.json '$s/ }$//'
try 'a brace too few' check brace.json
spec between.json '/"init": 1/s/,$//'
try 'a comma too few' check between.json
try 'a file that is not there' check nsaa.json
try 'a file that is not there, and none like it' check gate.json
try 'its ending forgotten' check nsa
try 'a command misspelt' chekc nsa.json
try 'no command' nsa.json
try 'a flag misspelt' plan nsa.json --jsno
spec key.json 's/"nodes": \[/"node": [/'
try 'a key misspelt' check key.json
spec op.json 's/"op": "topk"/"op": "top_k"/'
try 'an op misspelt' check op.json
spec noop.json 's/"op": "topk"/"op": "router"/'
try 'an op that there is not' check noop.json
spec tensor.json 's/"gate": "gate",/"gate": "gates",/'
try 'a tensor misspelt' check tensor.json
spec attr.json 's/"window_left"/"window"/'
try 'an attribute misspelt' check attr.json
spec port.json 's/"lse": "cmp_lse", "cu/"lsee": "cmp_lse", "cu/'
try 'a port misspelt' check port.json
spec missing.json 's/"q": "q", "k": "k", "v": "v", "cu/"q": "q", "cu/'
try 'inputs forgotten' check missing.json
spec lengths.json 's/, "cu_seqlens": "cu_seqlens"//
  s/"cu_seqlens": { "shape": \["B+1"\], "dtype": "i32"/"bias": { "shape": ["H"], "dtype": "f32"/'
try 'no lengths at all' check lengths.json
spec shape.json 's/"k":    { "shape": \["T", "KH", "D"\]/"k":    { "shape": ["T", "KH"]/'
try 'an axis too few' check shape.json
spec several.json 's/"op": "topk"/"op": "top_k"/; s/"window_left"/"window"/
  s/"grad": true/"grad": "yes"/'
try 'several at once' check several.json
try 'several at once, none of them by what is set' check several.json --set H=8
try 'a type that there is not' check nsa.json --set dtype=fp16
try 'heads that there cannot be' check nsa.json --set H=0
{ printf '\xef\xbb\xbf'; cat nsa.json; } >bom.json
try 'saved with a byte order mark' check bom.json
try 'numbers that do not go together' check nsa.json --set stride=10
try 'a dimension left open' plan nsa.json
cp "$source/examples/nsa_serve.json" serve.json
try 'dimensions left open' plan serve.json
try 'a dimension that there is not' plan nsa.json --set t=4096
try 'a flag too few' plan nsa.json --set T=4096 B=2
try 'a blank for =' plan nsa.json --set T 4096
try 'a policy word misspelt' plan nsa.json --set T=4096 --policy al
try 'a budget by a unit that is none' plan nsa.json --set T=4096 --policy 6gib
try 'spec and policy swapped' plan all.json --policy nsa.json
echo '{ "regraph_policy": 1, "recompute": ["swa", "topk", "slc"] }' >names.json
try 'a policy for another spec' plan nsa.json --set T=4096 --policy names.json
try 'a budget too small' plan nsa.json --set T=4096 --threads 2 --policy 100MB
try 'ranks that do not divide' plan nsa.json --set T=4096 --cp 3
try 'no such device' plan nsa.json --set T=64 --device gpu
try 'a GPU that is not there' run nsa.json --set T=64 --device cuda
try 'an array under no name' run nsa.json --set T=64 --out o.npy
try 'an output that there is not' run nsa.json --set T=64 --out O=o.npy
try 'an array that is not there' run nsa.json --in q=q.npy
try 'a format misspelt' schema plna
try 'an op misspelt' ops topks
try 'a table that is none' pack nsa.json

exec >&3
cmp -s said.txt "$golden" || {
  diff "$golden" said.txt
  [ -z "${RG_GOLDEN_UPDATE:-}" ] || cp said.txt "$golden"
  echo "what is said of $count mistakes differs from $golden"
  exit 1
}
echo "$count mistakes, each with what it always said"

#!/usr/bin/env bash
# The command as a user meets it: exit codes, messages, streams, files. Usage: cli.sh REGRAPH
# SOURCE_DIR
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# ---- help, version, mistakes ---------------------------------------------------------------------
expect 0 '^regraph [0-9]+\.[0-9]+\.[0-9]+$' --version
expect 0 'usage: regraph COMMAND' --help
expect 0 'usage: regraph COMMAND' help
for command in ops schema check plan pareto run bench tune pack help; do
  expect 0 "usage: regraph $command " "$command" --help
  expect 0 "usage: regraph $command " help "$command"
  expect 0 '^regraph [0-9]' "$command" --version
  expect 2 "unknown flag '--versoin'; did you mean '--version'" "$command" --versoin
done
expect 0 '^\.TH REGRAPH 1' help --man
expect 0 'complete -F _regraph regraph' help --completion bash
cp stdout completion
bash -n completion || fail "the completion is no bash"
completes() { # completes "WORDS…" EXPECTED
  checks=$((checks + 1))
  local got
  got=$(bash -c 'source ./completion; compopt() { :; }; COMP_WORDS=('"$1"')
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _regraph; printf "%s " "${COMPREPLY[@]}"')
  [ "$got" = "$2 " ] || fail "completion of '$1': '$got', expected '$2'"
}
completes 'regraph pl' 'plan'
completes 'regraph run x --se' '--set --seed'
completes 'regraph plan --device ""' 'cpu cuda'
completes 'regraph schema p' 'policy profile plan pareto'
PATH=$(dirname "$regraph"):$PATH
completes 'regraph ops comp' 'compress_kv'
completes 'regraph plan x --policy al' 'all'
completes "regraph plan $nsa --set st" 'stride='
completes "regraph run $nsa --in ''" 'q= k= v= gate= cu_seqlens='
completes "regraph run $nsa --out ''" 'o='
touch only.npy
completes "regraph run $nsa --out o = on" 'only.npy'
completes "regraph run $nsa --out o =" "$(compgen -f | tr '\n' ' ' | sed 's/ $//')"
completes "regraph plan $nsa --set T = on" ''
completes "regraph pack x.csv --out on" 'only.npy'
completes 'regraph check comple' ''
cp "$nsa" complete.json
completes 'regraph check comple' 'complete.json'
mkdir odd
touch 'odd/a b.json' 'odd/*.json' 'odd/$(false).json'
checks=$((checks + 1))
[ "$(bash -c 'source ./completion; compopt() { :; }
  COMP_WORDS=(regraph check odd/); COMP_CWORD=2; _regraph
  echo "${#COMPREPLY[@]}"')" = 3 ] || fail 'completion: a name with a blank is not one name'
completes 'regraph help --completion f' 'fish'
completes 'regraph plan --threads 4' ''
completes 'regraph plan x --profile shi' 'shipped'
completes 'regraph tune a.json comple' 'complete.json'
completes 'regraph tune --source on' ''
expect 0 '^#compdef regraph' help --completion zsh
cp stdout completion.zsh
expect 0 "seen_subcommand_from run' -l backward -d " help --completion fish
cp stdout completion.fish
for shell in zsh fish; do
  if command -v $shell >/dev/null; then
    $shell -n completion.$shell || fail "the completion is no $shell"
  else
    echo "skipped: $shell is not installed, so nothing reads its completion"
  fi
done
fish_completes() { # fish_completes LINE EXPECTED
  checks=$((checks + 1))
  local got
  got=$(fish --no-config -c "source completion.fish; complete -C '$1'" | cut -f1 | tr '\n' ' ')
  [ "$got" = "$2 " ] || fail "fish's completion of '$1': '$got', expected '$2'"
}
if command -v fish >/dev/null; then
  fish_completes 'regraph pl' plan
  fish_completes 'regraph ops comp' compress_kv
  fish_completes "regraph plan $nsa --set st" 'stride='
  fish_completes 'regraph plan --device c' 'cpu cuda'
  fish_completes 'regraph plan x --policy al' all
  fish_completes 'regraph plan x --timel' --timeline
  fish_completes 'regraph schema pl' plan
fi
expect 0 '^stride$' check "$nsa" --names set
[ "$(tr '\n' ' ' <stdout)" = 'T B H KH D DV kernel stride block top_n init local window dtype ' ] ||
  fail "names that --set binds"
expect 0 '^o$' check "$nsa" --names outputs
expect 0 '^slc_o$' check "$nsa" --names nodes
expect 2 'exclude each other' check "$nsa" --names set --json
expect 2 'usage: regraph COMMAND'
expect 2 "unknown command 'pareot'; did you mean 'pareto'" pareot
expect 2 "RG_E_USAGE: unknown flag '--polcy'; did you mean '--policy'" plan "$nsa" --polcy x
expect 2 'exclude each other' plan "$nsa" --set T=64 --json --dot
expect 2 "unknown format 'specs'; did you mean 'spec'" schema specs
expect 2 'expected spec.policy.profile.plan.pareto.run.bench.check.ops.trace' schema nothing
expect 2 'expected NAME=VALUE' plan "$nsa" --set T
expect 2 'expected NAME=VALUE' plan "$nsa" --set =4
expect 2 "two values, '4' and '5'" plan "$nsa" --set T=4 --set T=5
expect 2 "RG_E_USAGE.*T" plan "$nsa"
expect 2 'RG_E_USAGE' plan "$nsa" --set T=64 --set nosuch=1
expect 2 '--cp.*0' plan "$nsa" --set T=64 --cp 0

# ---- ops, schema, check --------------------------------------------------------------------------
expect 0 '^swa_attn: ' ops
expect 0 '"ops": \[' ops --json
expect 0 '^topk: ' ops topk
[ "$(grep -c '^[a-z]' stdout)" -eq 1 ] || fail "'ops topk' shows more than one op"
expect 2 "unknown op 'top_k'; did you mean 'topk'" ops top_k
for format in spec policy profile plan pareto run bench check ops trace; do
  expect 0 '\$schema' schema $format
done
for spec in "$examples"/*.json; do
  expect 0 ': ok — [0-9]+ nodes?,' check "$spec"
  [ "$(wc -l <stdout)" -eq 1 ] || fail "check $spec prints more than one line"
  expect 0 ': ok — [0-9]+ nodes?,' check "$spec" --set T=512 --set B=2
  for policy in none all budget groups; do
    expect 0 ': ok — ' check "$spec" --policy "$examples/policies/$policy.json"
  done
done
for policy in "$examples"/policies/*.json; do
  expect 0 ': ok — ' check "$nsa" --policy "$policy"
  expect 0 . plan "$nsa" "${small[@]}" --set T=300 --policy "$policy"
done
expect 0 ': ok — ' check "$nsa" --policy all --set T=64
expect 0 ': ok — ' check "$nsa" --policy 6GiB --set T=64
expect 0 '^standard input: ok — 6 nodes' check - <"$nsa"
expect 0 '"ok": true, "summary": "6 nodes' check - --json <"$nsa"
expect 0 ': ok — ' check "$nsa" --policy - <"$examples/policies/all.json"
expect 3 '^/dev/stdin:1:3: /regraph: RG_E_KEY: this is a spec, not a policy' check "$nsa" \
  --policy - <"$nsa"
printf 'id,lower,upper,size\na,0,2,4\n' >one.csv
expect 0 '^a,0,2,4,0$' pack - <one.csv
expect 2 "unknown flag '--verison'; did you mean '--version'" --verison
sed '1s/{/{ "$schema": "regraph.schema.json",/' "$nsa" >with_schema.json
expect 0 ': ok — ' check with_schema.json
expect 3 'RG_E_IO' check nowhere.json
expect 3 'RG_E_IO' check "$nsa" --policy nowhere.json
echo '{ "regraph": 1,' >broken.json
expect 3 'broken.json:[0-9]+:[0-9]+: RG_E_SYNTAX' check broken.json
sed 's/"op": "topk"/"op": "topkk"/' "$nsa" >wrong.json
expect 3 "wrong.json:19:29: /nodes/2/op: RG_E_[A-Z]+: .*topk" check wrong.json
echo '{ "regraph_policy": 1, "recompute": ["nosuch"] }' >policy.json
expect 3 'policy.json:1:38: /recompute/0: RG_E_' check "$nsa" --policy policy.json

# ---- plan ----------------------------------------------------------------------------------------
expect 0 'plan of nsa' plan "$nsa" --set T=4096
expect 0 '"predicted_peak_bytes"' plan "$nsa" --set T=4096 --json
expect 0 '^(di)?graph' plan "$nsa" --set T=4096 --dot
expect 0 . plan "$nsa" --set T=4096 --timeline
expect 0 'cmp_o' plan "$nsa" --set T=4096 --graph --svg memory.svg
expect 0 'nodes, free: T, B$' check "$nsa"
expect 2 "no dimension or parameter 'h' to set \(nearest: 'H'\)" check "$nsa" --set h=4
grep -q '<svg' memory.svg || fail "plan --svg writes no picture"
expect 0 'cuda' plan "$nsa" --set T=65536 --device cuda
expect 0 . plan "$nsa" --set T=64 --json --html page.html --trace trace.json
cp stdout plan.json
grep -q '<!doctype html>' page.html || fail "plan --html writes no page"
grep -q '"traceEvents"' trace.json || fail "plan --trace writes no trace"
expect 0 . plan "$nsa" --set T=64 --html page.html --against plan.json --policy all
grep -q 'id="data-against"' page.html || fail "plan --against compares nothing"
expect 0 . pareto "$nsa" --set T=64 --json
cp stdout front.json
expect 0 . plan "$nsa" --set T=64 --html page.html --front front.json
expect 2 '--against is for the page of --html FILE' plan "$nsa" --set T=64 --against plan.json
expect 3 'RG_E_IO: No such file.*; did you mean' plan "$nsa" --set T=64 --html p.html \
  --against pan.json
expect 3 "^front.json: RG_E_KEY: that is not what 'regraph plan --json' prints" plan "$nsa" \
  --set T=64 --html p.html --against front.json
sed 's/"capacity": {[^}]*}/"capacity": null/' plan.json >damaged.json
expect 3 "^damaged.json: RG_E_KEY: that is not what 'regraph plan --json' prints" plan "$nsa" \
  --set T=64 --html p.html --against damaged.json
expect 3 "RG_E_KEY: that is not what 'regraph pareto --json' prints" plan "$nsa" --set T=64 \
  --html p.html --front plan.json
head -c 70000 /dev/zero >zeros
expect 3 "^zeros: RG_E_SYNTAX: byte 0 is NUL; expected .* that 'regraph pareto --json' prints" \
  plan "$nsa" --set T=64 --html p.html --front zeros
expect 3 '^/: RG_E_IO: .*: Is a directory$' plan "$nsa" --set T=64 --html p.html --against /
expect 3 '^/: RG_E_IO: .*: Is a directory$' run "$nsa" --set T=64 --in q=/
expect 3 '^/: RG_E_IO: .*: Is a directory$' check "$nsa" --policy /
"$regraph" check - <. 2>stderr && fail "a folder is a spec"
grep -q '^standard input: RG_E_IO: .*: Is a directory$' stderr || fail "a folder: $(cat stderr)"
expect 1 'RG_E_IO' plan "$nsa" --set T=64 --html /nowhere/x.html
[ ! -e p.html ] || fail "a page that could not be written is there"
expect 1 'RG_E_IO' plan "$nsa" --set T=64 --svg /nowhere/x.svg
echo '{ "regraph_policy": 1, "budget": { "bytes": 1000 } }' >tiny.json
expect 4 'RG_E_INFEASIBLE' plan "$nsa" --set T=4096 --policy tiny.json
peaks=()
for flags in "" --no-inplace --no-reuse --no-grad --no-fuse; do
  expect 0 . plan "$nsa" --set T=4096 --json $flags
  peaks+=("$(value stdout predicted_peak_bytes)")
done
checks=$((checks + 1))
((peaks[0] <= peaks[1] && peaks[1] <= peaks[2] && peaks[0] < peaks[2] && peaks[3] < peaks[0] &&
  peaks[0] < peaks[4])) ||
  fail "peaks of plain, no-inplace, no-reuse, no-grad, no-fuse: ${peaks[*]}"
expect 0 . pareto "$nsa" "${small[@]}" --set T=512
expect 0 '"version": *1' pareto "$nsa" "${small[@]}" --set T=512 --json
points=$(grep -o '"peak_bytes"' stdout | wc -l)
expect 0 '' pareto "$nsa" "${small[@]}" --set T=512 --svg front.svg
checks=$((checks + 1))
python3 - "$points" <<'SVG' || fail "pareto --svg: $(head -c 300 front.svg)"
import sys, xml.dom.minidom
picture = xml.dom.minidom.parse("front.svg")
assert len(picture.getElementsByTagName("circle")) == int(sys.argv[1])
for c in picture.getElementsByTagName("circle"):
    x, y = float(c.getAttribute("cx")), float(c.getAttribute("cy"))
    assert 80 <= x <= 720.1 and 55.9 <= y <= 416.1
SVG
expect 2 'exclude each other' pareto "$nsa" "${small[@]}" --set T=512 --svg front.svg --json

# ---- run -----------------------------------------------------------------------------------------
expect 0 '^o +f32 +\[200, 4, 32\]' run "$nsa" "${small[@]}" --set T=200 --set B=3 --out o=a.npy
grep -q backward stdout && fail "a forward run reports a backward"
expect 0 . run "$nsa" "${small[@]}" --set T=200 --set B=3 --out o=b.npy --threads 1 \
  --policy "$examples/policies/all.json"
same 'threads and policy change no bit' a.npy b.npy
expect 0 . run "$nsa" "${small[@]}" --set T=200 --set B=3 --out o=b.npy --seed 1
cmp -s a.npy b.npy && fail "another seed gives the same output"
# o has the shape of q, so an output may come back as an input and settle T
expect 0 '\[200, 4, 32\]' run "$nsa" "${small[@]}" --in q=a.npy --out o=b.npy --grad-out q=dq.npy \
  --grad-out gate=dg.npy
expect 0 'grad q' run "$nsa" "${small[@]}" --in q=a.npy --grad-in o=b.npy --grad-out q=dq1.npy
expect 0 'backward' run "$nsa" "${small[@]}" --in q=a.npy --grad-in o=b.npy --grad-out q=dq2.npy \
  --policy "$examples/policies/groups.json"
same 'recomputed head group by head group, gradients keep every bit' dq1.npy dq2.npy
expect 0 '"measured_peak_bytes"' run "$nsa" "${small[@]}" --in q=a.npy --backward --json
for key in '"version": 1' '"forward_ms"' '"backward_ms": [0-9]' '"name": "topk"' '"results"'; do
  grep -q "$key" stdout || fail "run --json lacks $key"
done
checks=$((checks + 1))
[ "$(value stdout predicted_peak_bytes)" = "$(value stdout measured_peak_bytes)" ] ||
  fail "predicted and measured peak differ"
run_peak=$(value stdout predicted_peak_bytes)
expect 0 . plan "$nsa" "${small[@]}" --set T=200 --set B=1 --json
[ "$(value stdout predicted_peak_bytes)" = "$run_peak" ] ||
  fail "plan and run predict different peaks"
for spec in "$examples"/*.json; do
  case $spec in
  *serve*) continue ;; # no gradients, and tables that must be given: below
  *nsa_layer*) sizes=(--set M=64 --set H=2 --set KH=1 --set D=32 --set DV=32 --set T=150) ;;
  *moba*) sizes=(--set H=2 --set D=32 --set DV=32 --set block=32 --set T=150) ;;
  *) sizes=(--set H=2 --set KH=1 --set D=32 --set DV=32 --set T=150) ;;
  esac
  expect 0 'backward' run "$spec" "${sizes[@]}" --backward
  grep -q 'not finite' stdout && fail "run $spec: results are not finite"
  expect 0 'backward' run "$spec" "${sizes[@]}" --set B=4 \
    --backward --policy "$examples/policies/all.json"
done
layer=(--set M=64 --set H=4 --set KH=2 --set D=32 --set DV=32 --set T=150 --set B=2 --set dtype=f32)
for policy in none all groups; do
  expect 0 'backward' run "$examples/nsa_layer.json" "${layer[@]}" \
    --policy "$examples/policies/$policy.json" \
    --grad-out wq=wq-$policy.npy --grad-out x=x-$policy.npy
  same "a layer's weight gradient under $policy" wq-none.npy wq-$policy.npy
  same "a layer's input gradient under $policy" x-none.npy x-$policy.npy
done

# a step over pages: two sequences, at 1 of 1 and 129, 130 of 130 tokens
i4() { npy "$1" "{'descr': '<i4', 'fortran_order': False, 'shape': ($2), }"; }
printf '\1\0\0\0\2\0\0\0' | i4 lengths.npy 2,
printf '\1\0\0\0\202\0\0\0' | i4 context.npy 2,
printf '\1\0\0\0\54\1\0\0' | i4 long.npy 2, # 300
printf '\3\0\0\0\377\377\377\377\1\0\0\0\2\0\0\0' | i4 pages.npy 2,2
printf '\377\377\377\377\377\377\377\377' | i4 forks.npy 1,2
printf '\1\0\0\0\143\0\0\0\7\0\0\0' | i4 tokens.npy 3,
step=(--set H=2 --set KH=1 --set D=32 --set DV=32 --set T=3 --set P=4 --in lengths=lengths.npy
  --in pages=pages.npy --in forks=forks.npy)
expect 0 '^o +bf16 +\[3, 2, 32\]' run "$examples/nsa_serve.json" "${step[@]}" \
  --in context=context.npy
expect 3 'RG_E_DATA: .*context\[1\] is 300; expected 0 to 256' \
  run "$examples/nsa_serve.json" "${step[@]}" --in context=long.npy
expect 0 '^next +i32 +\[2\]' run "$examples/serve_model.json" "${step[@]}" --set W=64 --set F=64 \
  --set V=100 --set layers=2 --in tokens=tokens.npy --in context=context.npy

# arrays that do not fit
f4="{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
i4="{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }"
printf '\0\0\0\0\0\0\0\0' | npy two.npy "$f4"
printf '\0\0\0\0\010\0\0\0\310\0\0\0' | npy cu.npy "$i4"   # 0, 8, 200
printf '\0\0\0\0\310\0\0\0\010\0\0\0' | npy fall.npy "$i4" # 0, 200, 8
head -c 1000 a.npy >short.npy
expect 0 '\[200, 4, 32\]' run "$nsa" "${small[@]}" --in q=a.npy --in cu_seqlens=cu.npy
expect 3 'fall.npy: RG_E_DATA' run "$nsa" "${small[@]}" --in q=a.npy --in cu_seqlens=fall.npy
expect 3 'RG_E_SHAPE' run "$nsa" "${small[@]}" --in q=a.npy --in cu_seqlens=cu.npy --set B=3
expect 3 'RG_E_SHAPE' run "$nsa" "${small[@]}" --in q=a.npy --set T=300
expect 3 'RG_E_SHAPE' run "$nsa" --in q=a.npy
expect 3 'RG_E_(RANK|SHAPE)' run "$nsa" "${small[@]}" --in q=two.npy
expect 3 'RG_E_(RANK|SHAPE)' run "$nsa" "${small[@]}" --in q=a.npy --grad-in o=two.npy
expect 3 'short.npy: RG_E_SYNTAX: truncated' run "$nsa" "${small[@]}" --in q=short.npy
expect 3 'cu.npy: RG_E_DTYPE' run "$nsa" "${small[@]}" --in q=cu.npy
expect 3 'two.npy: RG_E_DTYPE' run "$nsa" "${small[@]}" --in cu_seqlens=two.npy
expect 3 'RG_E_IO' run "$nsa" "${small[@]}" --in q=nowhere.npy
expect 2 "no input 'Q'; did you mean 'q'" run "$nsa" "${small[@]}" --in Q=a.npy
expect 2 "no input 'x'; it has q, k, v, gate, cu_seqlens" run "$nsa" "${small[@]}" --in x=a.npy
expect 2 "no output 'oo'; did you mean 'o'" run "$nsa" "${small[@]}" --set T=64 --out oo=x.npy
expect 2 'expected NAME=FILE.npy' run "$nsa" "${small[@]}" --in a.npy
expect 2 "names 'q' twice" run "$nsa" "${small[@]}" --in q=a.npy --in q=b.npy
expect 2 "RG_E_USAGE.*'T'" run "$nsa" "${small[@]}"
expect 2 'no backward' run "$nsa" "${small[@]}" --set T=64 --no-grad --backward
expect 1 'RG_E_IO' run "$nsa" "${small[@]}" --set T=64 --out o=/nowhere/o.npy
CUDA_VISIBLE_DEVICES='' expect 5 'RG_E_DEVICE' run "$nsa" "${small[@]}" --set T=64 --device cuda
CUDA_VISIBLE_DEVICES='' expect 5 'RG_E_DEVICE' bench "$nsa" "${small[@]}" --set T=64 --device cuda
echo '{ "regraph_policy": 1, "nodes": { "slc_o": "offload" } }' >off.json
expect 0 '"host_bytes": [1-9]' run "$nsa" "${small[@]}" --set T=64 --policy off.json --json
expect 0 "of the host's memory" run "$nsa" "${small[@]}" --set T=64 --policy off.json --backward

expect 0 '"points"' pareto "$nsa" "${small[@]}" --set T=64 --policy off.json --json
mv stdout named.json
echo '{ "regraph_policy": 1, "nodes": { "slc_o": "offload" }, "budget": "1GiB" }' >budget.json
expect 0 '"points"' pareto "$nsa" "${small[@]}" --set T=64 --policy budget.json --json
same 'the front beside a node offloaded by name, with a budget' stdout named.json
echo '{ "regraph_policy": 1, "nodes": { "slc_o": "offload" }, "host": "1GiB" }' >host.json
expect 0 '"offload": \["slc_o"' pareto "$nsa" "${small[@]}" --set T=64 --policy host.json --json
expect 0 'recomputed; offloaded' pareto "$nsa" "${small[@]}" --set T=64 --policy host.json

# a graph with state: read from a file, or zeros
cat >state.json <<'SPEC'
{ "regraph": 1, "name": "pages", "inputs": { "pages": { "shape": ["N", 2], "dtype": "i32" } },
  "state": { "cache": { "shape": ["P", 2], "dtype": "f32", "next": "now" } },
  "nodes": [ { "name": "fork", "op": "page_copy", "in": { "cache": ["cache"], "pages": "pages" },
               "out": { "cache": ["now"] } } ],
  "outputs": { "now": "now" } }
SPEC
i4x2="{'descr': '<i4', 'fortran_order': False, 'shape': (1, 2), }"
printf '\1\0\0\0\0\0\0\0' | npy pages.npy "$i4x2"
f4x4="{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }"
printf '\0\0\0\0\0\0\0\0\0\0\200\77\0\0\0\100' | npy cache.npy "$f4x4"    # 0, 0; 1, 2
printf '\0\0\200\77\0\0\0\100\0\0\200\77\0\0\0\100' | npy copied.npy "$f4x4" # 1, 2; 1, 2
expect 0 'now +f32' run state.json --in pages=pages.npy --in cache=cache.npy --out now=now.npy
tail -c 16 now.npy >now.raw
tail -c 16 copied.npy >copied.raw
same 'a page that was copied' now.raw copied.raw
expect 0 'now +f32 +.* 0$' run state.json --in pages=pages.npy --set P=2
sed 's/"pages": {/"pages": { "shape": ["N", 2], "dtype": "i32" }, "forks": {/
  s/"pages": "pages"/"pages": "forks"/' state.json >forks.json
printf '\5\0\0\0\0\0\0\0' | npy forks.npy "$i4x2"
expect 3 '^fork: RG_E_DATA: pages.0..0. is 5' run forks.json --in pages=pages.npy \
  --in forks=forks.npy --set P=2
cat >chosen.json <<'SPEC'
{ "regraph": 1, "params": { "block": 32 },
  "inputs": { "q": { "shape": ["T", 2, 32], "dtype": "f32" },
              "k": { "shape": ["T", 1, 32], "dtype": "f32" },
              "v": { "shape": ["T", 1, 32], "dtype": "f32" },
              "idx": { "shape": ["T", 1, 2], "dtype": "i32" },
              "cu_seqlens": { "shape": ["B+1"], "dtype": "i32" } },
  "nodes": [ { "name": "a", "op": "slc_attn", "attrs": { "block": "$block" },
               "in": { "q": "q", "k": "k", "v": "v", "idx": "idx", "cu_seqlens": "cu_seqlens" },
               "out": { "o": "o" } } ],
  "outputs": { "o": "o" } }
SPEC
expect 2 'give them by --in idx=FILE.npy' run chosen.json --set T=64
expect 2 'no backward direction' run chosen.json --set T=64 --backward

# ---- ranks: the files of several are those of one ------------------------------------------------
batch=("${small[@]}" --set T=256 --set B=3 --set dtype=f32 --seed 3)
expect 0 . run "$nsa" "${batch[@]}" --out o=o1.npy --grad-out q=q1.npy --grad-out k=k1.npy
for n in 2 4; do
  expect 0 . run "$nsa" "${batch[@]}" --cp $n --out o=o$n.npy --grad-out q=q$n.npy \
    --grad-out k=k$n.npy
  same "o of $n ranks" o1.npy o$n.npy
  same "the gradient of q of $n ranks" q1.npy q$n.npy
  checks=$((checks + 1))
  [ "$(wc -c <k1.npy)" = "$(wc -c <k$n.npy)" ] ||
    fail "the gradient of k of $n ranks has another size"
done
expect 0 'all_gather.*forward' run "$nsa" "${batch[@]}" --cp 4
expect 0 '"name": "k.gather"' run "$nsa" "${batch[@]}" --cp 4 --json
expect 3 "$nsa:11:5: /nodes/0: RG_E_SHAPE: 250 rows do not divide among 4 ranks.*is 256" run \
  "$nsa" "${small[@]}" --set T=250 --cp 4
expect 0 'all_gather' bench "$nsa" "${batch[@]}" --cp 2 --repeat 2
expect 0 "^ranks *4" plan "$nsa" "${small[@]}" --set T=256 --cp 4

# ---- bench ---------------------------------------------------------------------------------------
expect 0 'GFLOP/s' bench "$nsa" "${small[@]}" --set T=256 --repeat 2
expect 0 '"version": 1' bench "$nsa" "${small[@]}" --set T=256 --repeat 3 --json
for key in forward_ms backward_ms predicted_peak_bytes measured_peak_bytes; do
  [ -n "$(value stdout $key)" ] || fail "bench --json lacks $key"
done
# A path is any bytes, JSON is UTF-8.
cp "$nsa" $'b\xff\xc3\xa9\xe2\x82".json'
expect 0 '"spec": "b\\\\xffé\\\\xe2\\\\x82\\"\.json"' run \
  $'b\xff\xc3\xa9\xe2\x82".json' "${small[@]}" --set T=64 --json
# Five layers: a line for what they have alike, with the mean; three stay as they are. JSON has all.
model=("$examples/nsa_model.json" --set M=32 --set H=2 --set D=16 --set DV=16 --set T=64 --repeat 1)
expect 0 '^layer\*_q_proj +linear +forward .* %.?  each of 5$' bench "${model[@]}" --set layers=5
if grep -q layer1_ stdout; then fail "bench does not fold layers: $(grep layer1_ stdout)"; fi
expect 0 '^layer\*_q_proj .* %  each of 5$' run "${model[@]:0:11}" --set layers=5
expect 0 '^layer2_q_proj +linear +forward ' bench "${model[@]}" --set layers=3
expect 0 '"name": "layer4_q_proj"' bench "${model[@]}" --set layers=5 --json
tiny=(--set H=2 --set KH=1 --set D=8 --set DV=8 --repeat 1)
expect 0 '^ *1K +8 +1 ' bench "$examples/nsa_serve.json" "${tiny[@]}" --serve
[ "$(grep -cE '^ *2K +1 +(64|256) ' stdout)" = 2 ] || fail "bench --serve lacks pieces"
expect 0 '^4 x 512, 1 new: .* slc_o ' bench "$examples/nsa_serve.json" "${tiny[@]}" --serve \
  --eager --set P=16
expect 2 'specs of a serving step' bench "$nsa" "${small[@]}" --set T=64 --serve
few=(--set B=8 --set M=64 --set P=512 --set F=1
  --policy "$examples/policies/split_kv.json")
expect 0 'split_kv +changes nothing: it is for GPUs' plan "$examples/nsa_serve.json" "${few[@]}" \
  --set T=8
expect 0 'split_kv +keys of single tokens shared out: 1 node$' plan "$examples/nsa_serve.json" \
  "${few[@]}" --set T=8 --device cuda
expect 0 '"split_kv_nodes": 0' plan "$examples/nsa_serve.json" "${few[@]}" --set T=9 --json \
  --device cuda
expect 2 'leave their number free' bench "$examples/nsa_serve.json" --serve --set T=7
expect 2 'leave one of the two out' bench "$examples/nsa_serve.json" --serve --html serve.html

# Sequences of one token each: a query sees one key, 2·(32 + 32) products for each of 4 heads.
expect 0 '"flops"' run "$nsa" "${small[@]}" --set T=256 --set B=256 --json
checks=$((checks + 1))
for node in swa_o slc_o; do
  grep "\"name\": \"$node\"" stdout | grep -q '"flops": 131072,' ||
    fail "live work: $(grep "\"$node\"" stdout)"
done
grep '"name": "cmp_o"' stdout | grep -q '"flops": 0,' || fail "live work: $(grep '"cmp_o"' stdout)"

# ---- pack ----------------------------------------------------------------------------------------
printf 'id,lower,upper,size\na,0,2,4\nb,2,4,4\nc,1,3,4\n' >in.csv
expect 0 '^id,lower,upper,size,offset$' pack in.csv
grep -q '^peak 8, lower bound 8' stderr || fail "pack: $(cat stderr)"
cp stdout plain.csv
expect 0 '' pack in.csv --out out.csv --limit 1
same 'pack --out writes what it prints' plain.csv out.csv
expect 0 . pack in.csv --capacity 8
expect 4 'RG_E_INFEASIBLE' pack in.csv --capacity 7B
printf 'id,lower,upper\na,0,2\n' >bad.csv
expect 3 'bad.csv' pack bad.csv
expect 1 'RG_E_IO' pack in.csv --out /nowhere/out.csv

# ---- streams -------------------------------------------------------------------------------------
if [ -w /dev/full ]; then
  checks=$((checks + 1))
  "$regraph" ops >/dev/full 2>stderr
  [ $? -eq 1 ] || fail "a full disk behind stdout goes unnoticed"
  grep -q "standard output: RG_E_IO: can't be written" stderr || fail "a full disk: $(cat stderr)"
fi
# A reader that goes away ends the command by SIGPIPE (141 in a shell), in silence; also where it
# inherits that SIGPIPE is ignored.
for action in - ''; do
  checks=$((checks + 1))
  {
    trap "$action" PIPE
    sleep 0.3 # the reader is gone by now
    "$regraph" ops 2>stderr
    echo $? >code
  } | true
  [ "$(cat code)" -eq 141 ] ||
    fail "a closed pipe (trap '$action' PIPE) gives exit code $(cat code)"
  [ -s stderr ] && fail "a closed pipe (trap '$action' PIPE): $(cat stderr)"
done

# ---- files are written whole or not at all -------------------------------------------------------
run_small() { expect "$1" "$2" run "$nsa" "${small[@]}" --set T=200 "${@:3}"; }
none_left() { # none_left WHAT: no temporary file here
  checks=$((checks + 1))
  [ -z "$(find . -name '.regraph*')" ] || fail "$1 leaves $(find . -name '.regraph*')"
}
run_small 0 . --out o=whole.npy
cp whole.npy before.npy
checks=$((checks + 1))
(ulimit -f 8 && "$regraph" run "$nsa" "${small[@]}" --set T=200 --seed 3 --out o=whole.npy) \
  >stdout 2>stderr
[ $? -eq 1 ] || fail "a limit on file sizes: exit code is not 1"
grep -q "whole.npy: RG_E_IO: can't be written" stderr || fail "a limit on file sizes: $(cat stderr)"
same 'a limit on file sizes leaves the earlier file' whole.npy before.npy
none_left 'a limit on file sizes'
seq 0 3000 | sed 's/.*/b&,&,&9,7/; 1i id,lower,upper,size' >many.csv
cp plain.csv packed.csv
(ulimit -f 8 && "$regraph" pack many.csv --limit 1 --out packed.csv) >stdout 2>stderr
[ $? -eq 1 ] || fail "pack under a limit on file sizes: exit code is not 1"
same 'the same for pack --out' packed.csv plain.csv
(ulimit -f 8 && "$regraph" plan "$nsa" --set T=4096 --svg packed.csv) >stdout 2>stderr
[ $? -eq 1 ] || fail "plan --svg under a limit on file sizes: exit code is not 1"
same 'the same for plan --svg' packed.csv plain.csv
none_left 'a limit on file sizes'
if [ -w /dev/full ]; then
  run_small 1 "/dev/full: RG_E_IO: can't be written" --out o=/dev/full
  expect 1 "/dev/full: RG_E_IO: can't be written" pack in.csv --out /dev/full
  [ -c /dev/full ] || fail "/dev/full is gone"
fi
chmod 640 whole.npy
ln -s whole.npy link.npy
run_small 0 . --seed 3 --out o=link.npy
[ -L link.npy ] || fail "the link is gone"
[ "$(stat -c %a whole.npy)" = 640 ] || fail "the file's permissions are gone"
cmp -s whole.npy before.npy && fail "what the link leads to is not written"
run_small 0 . --out o=/dev/null --grad-out q=/dev/null
expect 0 . pack in.csv --out /dev/stdout
same 'pack --out /dev/stdout' stdout plain.csv
expect 2 "'-' names no file.*/dev/stdout" plan "$nsa" --set T=64 --html -
expect 2 "'-' names no file" pack in.csv --out -
run_small 2 "'-' names no file" --out o=-
[ ! -e ./- ] || fail "a file called '-' is there"
run_small 2 '--out o and --grad-out q both write' --out o=x.npy --grad-out q=./x.npy
run_small 2 '--grad-out k and --grad-out q both write' --grad-out k=link.npy --grad-out q=whole.npy
[ -e x.npy ] && fail "a refused run writes"
cp "$nsa" spec.json
"$regraph" plan spec.json --set T=64 --json >plan.json
cp plan.json before.json
expect 2 '--html would write over .*spec' plan spec.json --set T=64 --html ./spec.json
expect 2 '--svg would write over .*spec' pareto spec.json --set T=64 --svg spec.json
echo '{ "regraph_policy": 1 }' >keep.json
expect 2 '--trace would write over .*--policy' plan "$nsa" --set T=64 --policy keep.json \
  --trace keep.json
expect 2 '--out would write over .*spec' run spec.json --set T=64 --out o=spec.json
cp spec.json other.json
expect 2 '--profile-out would write over .*other.json' tune one.json other.json \
  --profile-out other.json
expect 2 '--out would write over .*in.csv' pack in.csv --out ./in.csv
cp whole.npy input.npy
run_small 2 '--out would write over .*--in' --in q=input.npy --out o=./input.npy
run_small 2 '--grad-out would write over .*--grad-in' --grad-in o=input.npy --grad-out q=input.npy
expect 2 '--html would write over .*--in' run "$nsa" --in q=input.npy --html input.npy
same 'an input that was to be written over' input.npy whole.npy
expect 2 '--html would write over .*--against' plan spec.json --set T=64 --html plan.json \
  --against plan.json
expect 2 '--trace and --html both write' plan spec.json --set T=64 --html new --trace ./new
expect 2 '--html and --out both write' run spec.json --set T=64 --html new --out o=new
[ -e new ] && fail "a refused command writes"
same 'a spec that was to be written over' spec.json "$nsa"
same 'a plan that was to be written over' plan.json before.json
expect 1 'RG_E_IO' plan "$nsa" --set T=64 --svg "$work"
run_small 1 'RG_E_IO' --out o="$work"
none_left 'writing'

# what alignment takes counts where a choice is proved: offloading one of two is better than none
echo '{ "regraph_policy": 1, "budget": { "bytes": 8, "of": "saved" }, "host": 1064960 }' >tight.json
expect 0 '^  offload ' plan "$examples/two_branch.json" --set T=256 --profile shipped \
  --policy tight.json

# ---- messages ------------------------------------------------------------------------------------
clean() { # what was said has no control characters, and one line
  checks=$((checks + 1))
  if tr -d '\n' <stderr | LC_ALL=C grep -q '[[:cntrl:]]'; then
    fail "$1: control characters in $(cat -v stderr)"
  fi
  [ "$(wc -l <stderr)" -eq 1 ] || fail "$1: $(wc -l <stderr) lines: $(cat -v stderr)"
}
esc=$(printf '\033[31m')
sed 's/\["T", *"H", *"D"\]/["T\\n\\u001b[2J+", "H", "D"]/' "$nsa" >newline.json
expect 3 'T\\n\\x1b\[2J\+' check newline.json
clean 'a shape expression'
expect 3 'no\\nwhere\\x1b\[31m.json: RG_E_IO' check "no
where$esc.json"
clean 'a file name'
expect 2 "unknown flag '--a\\\\x1b\[31m'" plan "$nsa" --a"$esc"
clean 'a flag'
printf '' | npy odd.npy "{'descr': '<${esc}8', 'fortran_order': False, 'shape': (2,), }"
expect 3 "elements are '<\\\\x1b\[31m8'" run "$nsa" "${small[@]}" --in q=odd.npy
clean 'a dtype'
expect 2 "no input 'x\\\\x1b\[31m'" run "$nsa" "${small[@]}" --in "x$esc=a.npy"
clean 'a name'
printf 'id,lower,upper,size\na,0%s,1,4\n' "$esc" >odd.csv
expect 3 'lower is "0\\x1b\[31m"' pack odd.csv
clean 'a field'
printf 'id,lower,upper,size\na,0,1,4\0\n' >nul.csv
expect 3 'nul.csv:2:8: RG_E_SYNTAX: NUL byte' pack nul.csv
cp "$nsa" "odd$esc.json"
expect 0 '^odd\\x1b\[31m.json: ok' check "odd$esc.json"
expect 3 "RG_E_IO: can't open '': the name of the file is empty" check ''
expect 3 "RG_E_IO: can't open '': the name of the file is empty" pack ''
expect 1 'the name of the file is empty' pack in.csv --out ''
"$regraph" run "$nsa" "${small[@]}" --set T=64 --device cuda >/dev/null 2>stderr
grep -q 'was not found' stderr && fail "a build without CUDA: $(cat stderr)"

# ---- sizes and counts ----------------------------------------------------------------------------
expect 0 '"predicted_peak_bytes"' plan "$nsa" --set T=4096 --json
cp stdout plain.json
expect 0 '"predicted_peak_bytes"' plan "$nsa" --set T=4K --json
[ "$(value stdout predicted_peak_bytes)" = "$(value plain.json predicted_peak_bytes)" ] ||
  fail "T=4K is not T=4096"
expect 2 "'T' is set to '4KB'; expected an integer such as 4096 or 64K" plan "$nsa" --set T=4KB
expect 2 "'T' is set to '1.5K'" plan "$nsa" --set T=1.5K
for size in 64KB 64kB 64KiB 64K 1.5GiB 6G '6 GiB'; do
  expect 0 . pack in.csv --capacity "$size"
  printf '{ "regraph_policy": 1, "budget": { "bytes": "%s" } }' "$size" >size.json
  expect 0 ': ok' check "$nsa" --policy size.json
done
for size in 64kib 64X 1. 9999999TiB; do
  expect 2 'expected bytes such as' pack in.csv --capacity "$size"
  printf '{ "regraph_policy": 1, "budget": { "bytes": "%s" } }' "$size" >size.json
  expect 3 "size.json:1:45: /budget/bytes: RG_E_(VALUE|OVERFLOW)" check "$nsa" --policy size.json
done

# ---- what the documents say ----------------------------------------------------------------------
for width in D DV; do
  expect 0 ': ok' check "$nsa" --set D=576 --set DV=576
  expect 3 'head width 577 .* is not in 1 to 576' check "$nsa" --set $width=577
done
grep -q 'are 1 to 576 wide' "$source/docs/spec.md" || fail "docs/spec.md lacks the width of heads"
peak() { # peak TOKENS POLICY: sets bytes
  printf '{ "regraph_policy": 1, %s }' "$2" >readme.json
  expect 0 . plan "$nsa" --set "T=$1" --set B=1 --set H=64 --set KH=4 --device cuda \
    --policy readme.json --json
  bytes=$(value stdout predicted_peak_bytes)
}
# The README's memory figures, each under the policy that its row names, are what `plan` says.
plans() { # plans TOKENS POLICY GIB
  local decimals=${3#*.} bytes
  peak "$1" "$2"
  [ "$(awk -v d=${#decimals} -v x="$bytes" 'BEGIN { printf "%.*f", d, x / 2^30 }')" = "$3" ] ||
    fail "README.md has $3 GiB at $1 tokens under $2; plan has $bytes bytes"
}
# No more, whatever is written there.
least='"preset": "all", "split_heads": 1'
for most in '128K 2.85' '1M 21.41'; do
  peak "${most% *}" "$least"
  awk -v x="$bytes" -v most="${most#* }" 'BEGIN { exit !(x > 0 && x <= most * 2^30) }' ||
    fail "$bytes bytes at ${most% *} tokens, all recomputed, a head group at a time"
done
rows=0
while IFS='|' read -r _ tokens policy _ _ _ gib _; do
  tokens=${tokens// /} gib=${gib// /}
  case "$policy" in
  *'a head group at a time'*) members=$least ;;
  *'keep all'*) members='"preset": "none"' ;;
  *)
    fail "README.md: a figure of '$gib' under '$policy'"
    continue
    ;;
  esac
  plans "$tokens" "$members" "$gib"
  rows=$((rows + 1))
done < <(grep -E '^\| [0-9]+[KM] \|.*\| [0-9.]+ \|$' "$source/README.md")
[ "$rows" -ge 2 ] || fail "README.md: $rows rows with memory figures"
gib=$(tr '\n' ' ' <"$source/README.md" | sed -n 's/.* plans \([0-9.]*\) GiB at 128K.*/\1/p')
plans 128K '"preset": "all"' "${gib:-0.0}"

# ---- what is printed stays what it is ------------------------------------------------------------
"$regraph" help >help.txt
for command in ops schema check plan pareto run bench tune pack help; do
  "$regraph" help "$command" >>help.txt
done
same 'help is as recorded' help.txt "$source/tests/golden/cli/help.txt"

finish

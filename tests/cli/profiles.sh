#!/usr/bin/env bash
# Profiles as a user meets them: what tune measures and leaves, broken off and gone on with, and
# which one a plan finds. Usage: profiles.sh REGRAPH SOURCE_DIR
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# ---- tune: this machine's own profile, found by plans; broken off and gone on with ---------------
tiny=("${small[@]}" --repeat 1)
cp "$nsa" one.json
sed 's/"window": *[0-9]*/"window": 100/' "$nsa" >two.json
where() { env -u REGRAPH_PROFILE XDG_CACHE_HOME="$work/cache" "$regraph" "$@"; }
expect 0 '2 jobs measured.* in own.tsv; profile in own.json' tune one.json two.json "${tiny[@]}" \
  --set T=64 --profile-out own.json --source 'seen here'
checks=$((checks + 1))
[ "$(tail -1 own.tsv)" = '# complete' ] || fail "tune: the list ends with $(tail -1 own.tsv)"
head -n "$(grep -n '^# end' own.tsv | head -1 | cut -d: -f1)" own.tsv >first.tsv
nodes=$(grep -c '^one' first.tsv)
{
  cat first.tsv
  grep '^two' own.tsv | head -1
  printf 'two.json T=64 half a li'
} >again.tsv
expect 0 "$((2 * nodes)) nodes of 2 jobs" tune one.json two.json "${tiny[@]}" --set T=64 \
  --profile-out again.json --source 'seen here'
checks=$((checks + 1))
head -n "$(wc -l <first.tsv)" again.tsv | cmp -s - first.tsv ||
  fail 'tune: what had been measured was measured again'
! grep -q 'half a li' again.tsv && [ "$(grep -c '^two' again.tsv)" = "$nodes" ] ||
  fail 'tune: what broke off is still there'
expect 3 'no.json: RG_E_IO' tune one.json no.json "${tiny[@]}" --set T=64 --profile-out early.json
checks=$((checks + 1))
[ ! -e early.tsv ] || fail 'tune: a spec is measured before the next one is found wrong'
expect 0 ' nodes of 1 job measured' tune one.json "${tiny[@]}" --set T=64 --profile-out single.json
echo mine >mine.tsv
expect 2 'mine.tsv: .*something else' tune one.json "${tiny[@]}" --set T=64 --profile-out mine.json
[ "$(cat mine.tsv)" = mine ] || fail "tune: a file of the user's is gone"
exec 9>>own.tsv
flock 9
expect 1 'another tune is writing it' tune one.json "${tiny[@]}" --set T=64 --profile-out own.json
exec 9>&-
expect 0 '1 of 2 jobs measured when time was up' tune one.json two.json "${tiny[@]}" --set T=64 \
  --profile-out late.json --time-limit 1e-9
expect 0 '2 jobs measured' tune one.json two.json "${tiny[@]}" --set T=64 --profile-out late.json
expect 0 'times  *seen here; profile [0-9a-f]{8}, own.json$' plan one.json "${small[@]}" \
  --set T=64 --profile own.json
expect 0 'times  *measured at [0-9a-f]+ on one H200; profile [0-9a-f]{8}, shipped$' plan one.json \
  "${small[@]}" --set T=64 --device cuda --profile shipped
cat >raw.json <<'PROFILE'
{ "regraph_profile": 1, "device": "cpu", "matrix_gflops": { "f32": 1, "f16": 1, "bf16": 1 },
  "special_gops": 1, "bandwidth_gbs": 1, "memory": "1GiB" }
PROFILE
expect 0 'times  *uncalibrated; profile [0-9a-f]{8}, raw.json$' plan one.json "${small[@]}" \
  --set T=64 --profile raw.json
expect 2 "no profile 'own': .*: cpu h200 a100 l40s rtx4090 b200, the name" plan \
  one.json "${small[@]}" --set T=64 --profile own
expect 3 'no.such.json' plan one.json "${small[@]}" --set T=64 --profile no.such.json
checks=$((checks + 4))
where tune one.json "${tiny[@]}" --set T=64 >stdout || fail 'tune: into the cache folder'
where plan one.json "${small[@]}" --set T=64 |
  grep -q "times  *this machine, tuned .*cache/regraph/cpu.json" ||
  fail 'plan: does not find what tune left'
cp own.json cache/regraph/mine.json
where plan one.json "${small[@]}" --set T=64 --profile mine |
  grep -q 'times  *seen here.*regraph/mine.json' || fail 'plan: a profile by name'
REGRAPH_PROFILE=./own.json "$regraph" plan one.json "${small[@]}" --set T=64 |
  grep -q 'seen here' || fail 'plan: REGRAPH_PROFILE'
checks=$((checks + 1))
echo '{' >cache/regraph/cpu.json
where plan one.json "${small[@]}" --set T=64 2>&1 |
  grep -q 'cpu.json.*tune again, or say shipped' || fail 'plan: a profile that is broken'
where tune one.json "${tiny[@]}" --set T=64 >stdout || fail 'tune: does not mend a broken profile'
where plan one.json "${small[@]}" --set T=64 >stdout || fail 'plan: a profile that was mended'

finish

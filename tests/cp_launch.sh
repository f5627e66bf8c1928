#!/usr/bin/env bash
# regraph run as processes that a launcher would start (torchrun's or srun's variables, set by
# hand): the files of one run with thread ranks, bit for bit; a rank that dies, is interrupted or is
# one too many ends all the others.
#
#   tests/cp_launch.sh REGRAPH ROOT
set -euo pipefail
regraph=$1 root=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
port=$((20000 + $$ % 20000))
size=1024
args=(run "$root/examples/nsa.json" --set B=3 --set H=4 --set KH=2 --set D=16 --set DV=16
  --threads 1)
fail() { echo "FAILED: $1" >&2; cat "$work"/*.err >&2; exit 1; }

launcher=torchrun
start() { # NAME RANK WORLD ARGUMENTS…
  local name=$1 rank=$2 world=$3 told
  shift 3
  told=(RANK="$rank" WORLD_SIZE="$world" MASTER_ADDR=127.0.0.1 REGRAPH_MASTER_PORT="$port")
  [ $launcher = torchrun ] || # where they meet follows from the job's number
    told=(SLURM_PROCID="$rank" SLURM_NTASKS="$world" SLURM_LOCALID="$rank" SLURM_STEP_ID=0
      SLURM_JOB_ID="$port")
  env --default-signal=INT "${told[@]}" "$regraph" "${args[@]}" --set T=$size "$@" \
    >"$work/$name.$rank.out" 2>"$work/$name.$rank.err" &
  pids+=($!)
}
ends() { # expected exit code of each
  local i=0 code
  for want in "$@"; do
    code=0
    wait "${pids[i]}" || code=$?
    [[ $code =~ ^($want)$ ]] || fail "process $i ended with $code, expected $want"
    i=$((i + 1))
  done
}

for mode in 1 2; do
  [ $mode = 1 ] && launcher=torchrun || launcher=srun
  echo "{ \"regraph_policy\": 1, \"cp\": { \"mode\": $mode, \"weights\": \"local\" } }" \
    >"$work/policy.json"
  more=(--policy "$work/policy.json" --cp 2)
  "$regraph" "${args[@]}" --set T=$size "${more[@]}" --out o="$work/one.npy" \
    --grad-out k="$work/one_k.npy" >"$work/one.out"
  pids=()
  port=$((port + 1))
  for rank in 0 1; do start two $rank 2 "${more[@]}" --out o="$work/two.npy" \
    --grad-out k="$work/two_k.npy"; done
  ends 0 0
  cmp "$work/one.npy" "$work/two.npy" || fail "outputs differ in mode $mode"
  cmp "$work/one_k.npy" "$work/two_k.npy" || fail "gradients differ in mode $mode"
  [ ! -s "$work/two.1.out" ] || fail "rank 1 prints a report"
done

launcher=torchrun

# another number of ranks than asked for
pids=()
port=$((port + 1))
start other 0 2 --cp 4
ends 2
grep -q "the launcher started 2 ranks, the plan is for 4" "$work/other.0.err" ||
  fail "the number of ranks"

# one has another spec
pids=()
port=$((port + 1))
start spec 0 2 --cp 2 --out o="$work/spec.npy"
start spec 1 2 --cp 2 --set window=77
ends 6 6
grep -q "rank 1 has another spec than rank 0" "$work/spec.0.err" || fail "another spec"
[ ! -e "$work/spec.npy" ] || fail "a file of a failed run"

# one is interrupted while the others work
pids=()
port=$((port + 1))
size=98304
for rank in 0 1 2; do start stop $rank 3 --cp 3 --out o="$work/stop.npy" \
  --grad-out k="$work/stop_k.npy"; done
for _ in $(seq 300); do # until all three have met
  [ "$(grep -c ":$(printf %04X $port) [0-9A-F]*:[0-9A-F]* 01 " /proc/net/tcp)" -lt 3 ] || break
  sleep 0.1
done
sleep 0.5
kill -INT "${pids[1]}" 2>/dev/null || true
ends 6 '130|1' 6
grep -q "rank 1 ended without a word" "$work/stop.0.err" || fail "an interrupted rank"
[ -z "$(ls "$work" | grep stop.*npy || true)" ] || fail "a partial file"
echo "cp_launch: passed"

#!/usr/bin/env bash
# `regraph tune` broken off by Ctrl-C and by a kill, gone on with each time: its list and profile
# are those of a tune that ran through, in all but times, and what had been measured is not measured
# again. With that profile a plan made where no GPU is seen names the kernels that it names on one.
#   tests/tune.sh DEVICE [REGRAPH [SOURCE_DIR]]
# Exit code 77 where the device is cuda and there is no GPU.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
device=$1 regraph=$(realpath "${2:-$here/build/regraph}") source=${3:-$here}
if [ "$device" = cuda ] && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "tune on a GPU SKIPPED: no NVIDIA GPU on this machine"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# jobs: two specs at the CPU's three lengths, or six at one, where a GPU's six would take minutes
set_=(--set B=1 --set H=16 --set KH=1 --set T=8192) windows="512 100 200 300 400 500"
[ "$device" = cuda ] ||
  set_=(--set B=1 --set H=2 --set KH=1 --set D=32 --set DV=32 --repeat 1) windows="512 100"
specs=()
for window in $windows; do
  specs+=("$window.json")
  sed "s/\"window\": *[0-9]*/\"window\": $window/" "$source/examples/nsa.json" \
    >"$work/$window.json"
done
cd "$work"
fail() {
  echo "FAIL: $*" >&2
  exit 1
}
tune() { # PROFILE
  # what is begun in the background ignores Ctrl-C, and so would what is begun here
  exec env --default-signal=INT "$regraph" tune "${specs[@]}" "${set_[@]}" --device "$device" \
    --source here --profile-out "$1"
}
jobs_of() { # FILE, which may not be there yet
  local n
  n=$(grep -c '^# end' "$1" 2>/dev/null) || true
  echo "${n:-0}"
}

(tune whole.json) >whole.txt 2>/dev/null || fail "a tune that runs through: exit $?"
all=$(jobs_of whole.tsv)

# broken off as soon as one more job is done than before
for signal in INT KILL; do
  before=$(jobs_of parts.tsv)
  [ -e parts.tsv ] && cp parts.tsv before.tsv
  (tune parts.json) >/dev/null 2>&1 &
  pid=$!
  while [ "$(jobs_of parts.tsv)" -le "$before" ] && kill -0 $pid 2>/dev/null; do
    sleep 0.01
  done
  kill -$signal $pid 2>/dev/null || fail "it was done before it was broken off by SIG$signal"
  code=0
  wait $pid 2>/dev/null || code=$?
  [ $code -ge 128 ] || fail "broken off by SIG$signal: exit $code"
  [ "$(jobs_of parts.tsv)" -lt "$all" ] || fail "nothing was left after SIG$signal"
  ! grep -q '^# complete' parts.tsv || fail "it calls itself complete after SIG$signal"
  echo "SIG$signal after $(jobs_of parts.tsv) of $all jobs"
done
# A time that is none is no measurement: no profile is made of it that no plan can read.
sed '2,4s/[0-9.e+-]*$/inf/; 5s/[0-9.e+-]*$/nan/; /^# complete/d' whole.tsv >odd.tsv
(tune odd.json) >/dev/null 2>odd.txt || fail "a list with odd times: $(cat odd.txt)"
"$regraph" plan "$source/examples/nsa.json" --set T=64 --set B=1 --device "$device" \
  --profile odd.json >/dev/null || fail "the profile of a list with odd times"

lines=$(grep -n '^# end' parts.tsv | tail -1 | cut -d: -f1)
head -n "$lines" parts.tsv >kept.tsv
(tune parts.json) >parts.txt 2>/dev/null || fail "gone on with: exit $?"
head -n "$lines" parts.tsv | cmp -s - kept.tsv || fail "what had been measured was measured again"
for file in whole parts; do
  [ "$(tail -1 $file.tsv)" = '# complete' ] || fail "$file.tsv is not complete"
  cut -f1-9 $file.tsv >$file.cut # without times
  sed -E -n '/"measured"/,$s/, *[0-9.e+-]+ *\]/]/p' $file.json >$file.points
done
cmp whole.cut parts.cut || fail "another list than that of a tune that ran through"
[ -s whole.points ] || fail "a profile without points"
cmp whole.points parts.points || fail "another profile than that of a tune that ran through"

if [ "$device" = cuda ]; then
  kernels() { # what a plan says but for its memory: nodes, times and kernels
    "$regraph" plan 512.json "${set_[@]}" --device cuda --profile parts.json --json |
      grep -E '"(kernels|profile|times)"'
  }
  kernels >seen.txt
  CUDA_VISIBLE_DEVICES= kernels >unseen.txt
  grep -q '"kernels"' seen.txt || fail "a plan that names no kernels"
  cmp seen.txt unseen.txt || fail "other kernels where no GPU is seen"
fi
echo "tune on $device: $all jobs, broken off twice, gone on with"

# For the scripts beside it, which source it with their arguments: REGRAPH SOURCE_DIR.
set -u
regraph=$(realpath "$1")
source=$(realpath "$2")
examples=$source/examples
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
failures=0
checks=0

fail() {
  echo "FAIL: $*" >&2
  failures=$((failures + 1))
}

# expect CODE PATTERN arguments…: runs regraph; its exit code must be CODE, and stderr (stdout if
# CODE is 0) must match the extended regular expression PATTERN, or be empty if that is. Leaves the
# streams in ./stdout and ./stderr.
expect() {
  local code=$1 pattern=$2 stream=stderr
  shift 2
  checks=$((checks + 1))
  "$regraph" "$@" >stdout 2>stderr
  local got=$?
  [ "$code" -eq 0 ] && stream=stdout
  [ "$got" -eq "$code" ] || fail "regraph $*: exit $got, expected $code: $(head -c 400 stderr)"
  if [ -z "$pattern" ]; then
    [ -s "$stream" ] && fail "regraph $*: $stream is not empty"
  else
    grep -Eq -- "$pattern" "$stream" ||
      fail "regraph $*: $stream lacks /$pattern/: $(head -c 400 $stream)"
  fi
  if [ "$code" -ne 0 ] && [ -s stdout ]; then fail "regraph $*: data on stdout though it failed"; fi
  if [ "$code" -eq 0 ] && [ "$1" != pack ] && [ -s stderr ]; then
    fail "regraph $*: messages on stderr: $(head -c 400 stderr)"
  fi
}

# same WHAT FILE FILE
same() {
  checks=$((checks + 1))
  cmp -s "$2" "$3" || fail "$1: $2 and $3 differ"
}

# value FILE KEY: the number behind "KEY": in a JSON file
value() { grep -o "\"$2\": *[-0-9.e+]*" "$1" | head -1 | sed 's/.*: *//'; }

# npy FILE HEADER: a version 1 file with that header and what standard input holds
npy() {
  local n=${#2}
  {
    printf '\x93NUMPY\x01\x00'
    printf "\\x$(printf %02x $((n % 256)))\\x$(printf %02x $((n / 256)))"
    printf '%s' "$2"
    cat
  } >"$1"
}

small=(--set H=4 --set KH=2 --set D=32 --set DV=32 --set block=32 --set kernel=16 --set stride=8
  --set top_n=4
  --set window=48 --set dtype=f32)
nsa=$examples/nsa.json

finish() {
  echo "$checks checks, $failures failed"
  [ "$failures" -eq 0 ]
}

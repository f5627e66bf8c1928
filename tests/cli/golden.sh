#!/usr/bin/env bash
# What the command says and exits with, word for word: tests/golden/run/NAME.cmd holds arguments,
# NAME.expect the exit code and what came out on stderr. With RG_GOLDEN_UPDATE set, differing files
# are rewritten and the test still fails.
#   tests/cli/golden.sh REGRAPH
set -uo pipefail
regraph=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../golden/run" || exit 1
bad=0 count=0
huge=$(mktemp)
trap 'rm -f "$huge"' EXIT
for case in *.cmd; do
  name=${case%.cmd}
  count=$((count + 1))
  # shellcheck disable=SC2046
  message=$(CUDA_VISIBLE_DEVICES= "$regraph" $(cat "$case") 2>&1 >/dev/null)
  # not a line with a time in it; what a machine lacks for a GPU differs from one to the next
  got="$?"$'\n'"$(sed -e '/^peak /d' -e 's/\(RG_E_DEVICE\): .*/\1/' <<<"$message")"
  if [ "$got" != "$(cat "$name.expect" 2>/dev/null)" ]; then
    bad=$((bad + 1))
    echo "$name: got"
    echo "$got"
    [ -z "${RG_GOLDEN_UPDATE:-}" ] || echo "$got" >"$name.expect"
  fi
done
# too large to keep: 16 MiB and one byte
head -c 16777217 /dev/zero | tr '\0' ' ' >"$huge"
message=$("$regraph" check "$huge" 2>&1)
status=$?
count=$((count + 1))
case "$status $message" in
"3 $huge: RG_E_LIMIT: "*"16777216"* | "3 $huge: RG_E_LIMIT: "*"16 MiB"*) ;;
*)
  bad=$((bad + 1))
  echo "huge file: got $status $message"
  ;;
esac
echo "$((count - bad)) passed, $bad failed"
[ "$bad" -eq 0 ]

#!/usr/bin/env bash
# examples/serve.c as a user runs it: the same digest, of every token of every request, however the
# loop is cut, whatever pages there are, and when it is killed and starts again.
#   tests/serve.sh SERVE EXAMPLES
set -euo pipefail
serve=$1
cd "$2/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
  echo "tests/serve.sh: $1" >&2
  exit 1
}
# says FILE PATTERN: the file has such a line
says() {
  grep -Eq "$2" "$1" && return
  cat "$1" >&2
  fail "nothing here says '$2'"
}

"$serve" >"$work/first"
says "$work/first" \
  '^request 13 is refused: a request of 129 tokens and 8 more needs 9 pages; .* at most 8'
says "$work/first" 'step +32: .*served.*of 48 pages.*tokens/s, host'
says "$work/first" \
  ' [1-9][0-9]* were in pages already; [1-9][0-9]* times one had to wait, [1-9][0-9]* pages'
says "$work/first" '^65 ended, 6 cancelled, 1 refused: digest'
digest=$(tail -n 1 "$work/first")
same() {
  [ "$(tail -n 1 "$1")" = "$digest" ] && return
  cat "$1" >&2
  fail "$2: other tokens"
}

"$serve" --quiet --slots 1 --rows 200 --pages 8 --no-prefixes >"$work/alone"
same "$work/alone" "one after the other, nothing shared"
says "$work/alone" ' 0 were in pages already'
"$serve" --quiet --slots 16 --rows 16 --pages 10 >"$work/few"
same "$work/few" "few pages, a row for each"

# Killed while a step ran, twice; the second time with half a line behind.
journal=$work/journal
for at in 40 17; do
  { "$serve" --quiet --journal "$journal" --kill $at >"$work/killed"; } 2>/dev/null &&
    fail "a killed loop ended well"
done
printf '. 3 ' >>"$journal"
"$serve" --quiet --journal "$journal" >"$work/again"
says "$work/again" \
  '^restart: [1-9][0-9]* .*had ended, [1-9][0-9]* go on after .*ran was to make is lost'
same "$work/again" "killed and started again"
"$serve" --quiet --journal "$journal" >"$work/after"
says "$work/after" '^restart: 72 .*had ended, 0 go on .*nothing was in flight'
same "$work/after" "all from the journal"

# What is no journal is not cut.
for text in 'my only copy' 'my only copy
of two
step' 'q 3
step' '= 3
step
my only copy'; do
  echo "$text" >"$work/mine"
  if "$serve" --quiet --journal "$work/mine" >"$work/out" 2>"$work/error"; then
    fail "'$text' is a journal"
  fi
  says "$work/error" 'is of other requests; expected one of the same options'
  [ "$(cat "$work/mine")" = "$text" ] || fail "'$text' was written over"
done

# Two loops would mix their lines.
exec 9>>"$journal"
flock 9
if "$serve" --quiet --journal "$journal" 2>"$work/error"; then fail "a journal of two loops"; fi
says "$work/error" 'another loop writes the journal'
exec 9>&-
"$serve" --help >"$work/out" || fail "--help is wrong"
says "$work/out" '^serve \[SPEC\] '

if "$serve" --journal "$work/no/such" 2>"$work/error"; then fail "a journal nowhere"; fi
says "$work/error" "can't be written"
if "$serve" --slots 9 --rows 8 2>"$work/error"; then fail "fewer rows than slots"; fi
says "$work/error" 'RG_E_USAGE: steps of 8 rows, 9 slots'

# Options: which, what it was given, what is expected.
wrong() { # wrong PATTERN OPTION…
  local pattern=$1
  shift
  if "$serve" "$@" >"$work/out" 2>"$work/error"; then fail "$* is accepted"; fi
  says "$work/error" "^serve: $pattern"
}
for bad in 4x '' -1 0 1e3 99999999999999999999; do
  wrong "--slots '$bad': expected a whole number of at least 1" --slots "$bad"
done
wrong "--kill 'soon': expected a whole number of at least 0" --kill soon
for bad in '' , 16, ,16 16,16 64,16 16,x '16 64' 0 1,2,3,4,5; do
  wrong "--rows '$bad': expected up to 4 whole numbers that grow, such as 16,64" --rows "$bad"
done
wrong "--set 'layers': expected NAME=VALUE" --set layers
wrong "--pages: expected a value after it" --pages
wrong "there is no option '--page'; expected one of these:" --page 3

#!/usr/bin/env bash
# After a change to kernels or to CPU code that moves times: the shipped profile and the measurements it is made of, anew.
# On the machine that the profile is for, in a clean checkout, so that both name the commit that was measured:
#   bench/tune.sh cuda "one H200" [REGRAPH]
#   bench/tune.sh cpu "two cores of an AMD EPYC (AVX-512)" [REGRAPH]
# Broken off, it goes on. Then: the table that budgets.py prints goes to docs/benchmarks.md, on a GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in
cuda) file=h200 ;;
cpu) file=cpu ;;
*) sed -n '2,6s/^# *//p' "$0" >&2 && exit 2 ;;
esac
commit=$(git -C "$root" rev-parse --short HEAD)
profile=$root/recompute/profiles/$file.json
"${3:-$root/build/regraph}" tune --device "$1" --profile-out "$profile" --source "measured at $commit on $2"
[ "$1" = cpu ] || python3 "$root/bench/budgets.py" --profile "$profile"

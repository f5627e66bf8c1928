#!/usr/bin/env bash
# The build refuses an include against the order of the folders (cmake/folders.cmake): some are
# planted in a copy of the sources, each alone, and one of them is built.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/tree/tests"
cd "$work/tree"
folders=$(sed -n 's/^ *"\([a-z]*\):.*/\1/p' "$root/cmake/folders.cmake")
for part in CMakeLists.txt cmake include $folders; do
  [ ! -e "$root/$part" ] || cp -r "$root/$part" .
done
cp -r "$root/tests/ref" tests
fail() {
  echo "includes: $1" >&2
  cat "$work/out" >&2
  exit 1
}
look() { cmake "-DROOT=$PWD" -P cmake/includes.cmake >"$work/out" 2>&1; }
look || fail "the tree as it is does not pass"

refused() { # FILE, WHAT it includes, and the message
  printf '/* planted */\n#include %s\n' "$2" >"$1"
  ! look || fail "$1 may include $2"
  grep -qF "$1:2: error: $3" "$work/out" || fail "$1 with $2 is refused in other words than '$3'"
  rm "$1"
}
refused graph/planted.c '"exec/plan.h"' \
  "exec/plan.h: graph/ may include itself and the public headers"
refused graph/planted.h '"../memplan/memplan.h"' "memplan/memplan.h: graph/ may include"
refused graph/planted.c '<ops/ops.h>' "ops/ops.h: graph/ may include"
refused kernels/planted.cu '"../graph/ir.h"' "graph/ir.h: kernels/ may include"
refused ops/planted.c '"../kernels/device/seq.cuh"' "kernels/device/seq.cuh: ops/ may include"
refused ops/planted.c '"../exec/pool.h"' "exec/pool.h: ops/ may include"
refused memplan/planted.c '"../recompute/recompute.h"' "recompute/recompute.h: memplan/ may include"
refused recompute/planted.c '"../exec/plan.h"' "exec/plan.h: recompute/ may include"
refused exec/planted.c '"../tests/ref/ref.h"' "tests/ref/ref.h: exec/ may include"
refused exec/planted.c '"../report/report.h"' "report/report.h: exec/ may include"
refused cli/planted.c '"../graph/base.h"' "graph/base.h: cli/ may include"
refused exec/planted.c '<jansson.h>' "jansson.h: only graph/ sees jansson"
look || fail "something planted is still there"

printf '#include "exec/plan.h"\n' >graph/planted.c
cmake -S . -B build -DREGRAPH_CUDA=OFF -DREGRAPH_TESTS=OFF >"$work/out" 2>&1 ||
  fail "configuring failed"
! cmake --build build --target rgi_graph >"$work/out" 2>&1 ||
  fail "graph/ is built with an include of exec/plan.h"
grep -qF 'graph/planted.c:1: error: exec/plan.h: graph/ may include' "$work/out" ||
  fail "the build failed otherwise"
! grep -q 'Building C object' "$work/out" || fail "the build looked at includes too late"
echo "includes: ok"

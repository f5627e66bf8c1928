#!/usr/bin/env bash
# Installs a build into a fresh folder and builds the examples against it, through pkg-config and
# through CMake.
#   tests/install_test.sh BUILD
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
cmake -S "$root" -B "$build" -DCMAKE_INSTALL_PREFIX="$prefix" >/dev/null
cmake --build "$build" --parallel >/dev/null
cmake --install "$build" >/dev/null
libdir=$(dirname "$(find "$prefix" -name 'libregraph.so')")
for file in bin/regraph include/regraph/regraph.h include/regraph/op.h share/man/man1/regraph.1 \
  share/bash-completion/completions/regraph; do
  [ -s "$prefix/$file" ] || { echo "install_test: $file is missing" >&2; exit 1; }
done

# names: only the public ones leave the library
nm -D --defined-only "$libdir/libregraph.so" | awk '{print $3}' | grep -v '^rg_' | grep -v '^_' >"$work/names" || true
if [ -s "$work/names" ]; then
  echo "install_test: the library exports other names than rg_…:" >&2
  head "$work/names" >&2
  exit 1
fi

# versions: until 1.0 a minor version may break its callers, so the library's name and the CMake
# package both name it
version=$(sed -n 's/^project(regraph VERSION \([0-9]*\.[0-9]*\)\..*/\1/p' "$root/CMakeLists.txt")
next=${version%.*}.$((${version#*.} + 1))
soname=$(readelf -d "$libdir/libregraph.so" | sed -n 's/.*Library soname: \[\(.*\)\].*/\1/p')
[ "$soname" = "libregraph.so.$version" ] || {
  echo "install_test: the library calls itself '$soname'; expected libregraph.so.$version" >&2
  exit 1
}
for asked in "$version" "$next" "${version%.*}.0"; do
  mkdir "$work/ask-$asked"
  printf '%s\n' 'cmake_minimum_required(VERSION 3.20)' 'project(ask LANGUAGES C)' \
    "find_package(regraph $asked REQUIRED)" >"$work/ask-$asked/CMakeLists.txt"
  found=no
  ! cmake -S "$work/ask-$asked" -B "$work/ask-$asked/build" -DCMAKE_PREFIX_PATH="$prefix" \
    >/dev/null 2>&1 || found=yes
  expected=no
  [ "$asked" != "$version" ] || expected=yes
  [ "$found" = "$expected" ] || {
    echo "install_test: find_package(regraph $asked) finds $version: $found; expected $expected" >&2
    exit 1
  }
done

# pkg-config: every example in C, under each compiler there is, without a warning
export PKG_CONFIG_PATH=$libdir/pkgconfig
examples=(train_step build_spec)
nsa=("$root/examples/nsa.json" "$root/examples/policies/all.json")
compilers=0
for cc in gcc clang; do
  if ! command -v "$cc" >/dev/null; then
    echo "install_test: no $cc here, so the examples are not built with it" >&2
    continue
  fi
  compilers=$((compilers + 1))
  for example in "${examples[@]}"; do
    # shellcheck disable=SC2046
    "$cc" -std=c17 -Wall -Wextra -Werror -pedantic "$root/examples/$example.c" -o "$work/$example" \
      $(pkg-config --cflags --libs regraph) -lm
  done
  LD_LIBRARY_PATH=$libdir "$work/train_step" "${nsa[@]}" >"$work/out1"
  LD_LIBRARY_PATH=$libdir "$work/build_spec" >"$work/nodes"
  LD_LIBRARY_PATH=$libdir "$work/build_spec" --json >"$work/built.json"
done
[ "$compilers" -gt 0 ] || { echo "install_test: neither gcc nor clang" >&2; exit 1; }
grep -q '^near.bwd .*gradient' "$work/nodes" || {
  echo "install_test: build_spec lists no gradients" >&2
  exit 1
}

# the spec made by calls plans as the one in the file
for spec in "$work/built.json" "$root/examples/two_branch.json"; do
  "$prefix/bin/regraph" plan "$spec" --set T=1024 --set B=2 --json >"$work/plan-$(basename "$spec")"
done
cmp "$work/plan-built.json" "$work/plan-two_branch.json"

# CMake
mkdir "$work/project"
cat >"$work/project/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.20)
project(user LANGUAGES C)
find_package(regraph 0.1 REQUIRED)
add_executable(user $root/examples/train_step.c)
target_link_libraries(user PRIVATE regraph::regraph m)
END
cmake -S "$work/project" -B "$work/project/build" -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
cmake --build "$work/project/build" >/dev/null
"$work/project/build/user" "${nsa[@]}" >"$work/out2"
cmp "$work/out1" "$work/out2"

# the installed command finds its library and profiles
"$prefix/bin/regraph" plan "$root/examples/nsa.json" --set T=1024 --set B=1 >/dev/null
echo "install_test: ok"

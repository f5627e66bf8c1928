#!/usr/bin/env bash
# Installs a build into a fresh folder and builds the examples against it, through pkg-config and
# through CMake; then makes a wheel of the same objects and installs that into a virtual
# environment.
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
for file in bin/regraph include/regraph/{regraph,build,serving,names,op}.h \
  share/man/man1/regraph.1 share/bash-completion/completions/regraph \
  share/zsh/site-functions/_regraph share/fish/vendor_completions.d/regraph.fish; do
  [ -s "$prefix/$file" ] || { echo "install_test: $file is missing" >&2; exit 1; }
done

# names: only the public ones leave the library
nm -D --defined-only "$libdir/libregraph.so" | awk '{print $3}' | grep -v '^rg_' |
  grep -v '^_' >"$work/names" || true
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

# ---- Python: what `pip install .` gives ----------------------------------------------------------
# In the virtual environment python3's packages (numpy, torch) are seen.
python=$work/venv/bin/python
outside=$(python3 -c 'import site; print(*site.getsitepackages(), sep="\n")')
python3 -m venv "$work/venv" >"$work/log" 2>&1 &&
  echo "$outside" >"$("$python" -c 'import site; print(site.getsitepackages()[0])')/outside.pth" &&
  "$work/venv/bin/pip" install -q scikit-build-core numpy >"$work/log" 2>&1 || {
  tail -n 3 "$work/log"
  echo "skipped: the Python package, since no virtual environment with scikit-build-core and" \
    "numpy can be made here"
  echo "install_test: ok"
  exit 0
}
failed() {
  cat "$work/log" >&2
  echo "install_test: $1" >&2
  exit 1
}
export PATH=$work/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
unset LD_LIBRARY_PATH REGRAPH_LIBRARY
# scikit-build-core forgets what the folder was configured with; with the same options nothing is
# compiled again.
kept='(REGRAPH_|CMAKE_(BUILD_TYPE|C_FLAGS|(C|CUDA)_COMPILER_LAUNCHER))[A-Z_]*'
options=()
while IFS= read -r option; do options+=(--config-settings="cmake.define.$option"); done < <(
  sed -nE "s/^($kept):[A-Z]*=(.*)/\\1=\\5/p" \
    "$build/CMakeCache.txt")
status=0
pip wheel -q "$root" --no-deps --no-build-isolation -w "$work" \
  --config-settings=build-dir="$build" "${options[@]}" \
  >"$work/log" 2>&1 || status=$?
cmake -S "$root" -B "$build" '-USKBUILD*' >/dev/null # an ordinary build again
[ $status -eq 0 ] || failed "making a wheel failed"
pip install -q --no-deps "$work"/regraph-*.whl >"$work/log" 2>&1 ||
  failed "installing the wheel failed"
"$python" -c 'import subprocess, sys, tarfile; from scikit_build_core.build import build_sdist
names = tarfile.open(f"{sys.argv[1]}/{build_sdist(sys.argv[1])}").getnames()
names = {name.split("/", 1)[-1] for name in names}
wanted = {"CMakeLists.txt", "LICENSE", "graph/spec.c", "kernels/gemm.cu", "python/regraph/core.py"}
kept = subprocess.run(["git", "ls-files"], capture_output=True, text=True).stdout.split("\n")
missing, foreign = wanted - names, names - {*kept, "PKG-INFO"}
sys.exit(f"the sdist lacks {missing}, and has {foreign}" if missing or foreign else 0)' \
  "$work" >"$work/log" 2>&1 ||
  failed "making an sdist failed"
cd "$work" # away from the checkout's package
readelf -d venv/lib/python*/site-packages/regraph/lib*/libregraph.so.* | grep -o 'NEEDED.*\[.*' |
  sed 's/.*\[\(.*\)\]/\1/' |
  grep -vE '^(libjansson|libstdc\+\+|libgcc_s|libm|libc|libdl|libpthread|librt|ld-linux.*)\.so' \
    >log &&
  failed "the wheel's library wants what not every machine has"
said=$("$python" -c 'import regraph; print("regraph", regraph.__version__)') &&
  [ "$(regraph --version)" = "$said" ] ||
  failed "command and package do not agree on the version"
"$python" -c 'import regraph, sys
if not regraph.__file__.startswith(sys.prefix): sys.exit(regraph.__file__)
print(regraph.example("nsa.json"))' >log || failed "the installed package is not the one imported"
regraph check "$(cat log)" >/dev/null
if "$python" -c 'import torch' 2>/dev/null; then # README's lines, on the CPU and smaller
  sed -n '/^import torch, regraph/,/^```/p' "$root/README.md" |
    sed '/^```/d; s/"cuda"/"cpu"/; s/8192/256/g; s/3000/100/' >lines.py
  [ -s lines.py ] && "$python" lines.py >log 2>&1 || failed "README's lines for PyTorch failed"
else
  echo "skipped: README's lines for PyTorch, since python3 has no torch"
fi
echo "install_test: ok"

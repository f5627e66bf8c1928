#!/usr/bin/env bash
# Installs what is missing, builds, and passes all tests. Works from any folder, twice in a row,
# without CUDA.
#
#   tests/run.sh            everything, as CI does
#   tests/run.sh quick      the unit tests in one plain build
#   tests/run.sh STAGE…     named stages: release sanitize threads coverage static install adapters
#
# adapters, a part of everything where CI=true alone, brings 6 GiB of packages from PyPI
# (tests/adapters.sh).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
jobs=$(nproc 2>/dev/null || echo 2)
passed=0 failed=0
export REGRAPH_PROFILE=shipped # whatever was tuned on this machine
stages=("$@")
if [ $# -eq 0 ]; then
  stages=(release sanitize threads coverage static install)
  [ "${CI:-}" != true ] || stages+=(adapters)
fi
[ "${1:-}" != quick ] || stages=(release)

# ---- packages ------------------------------------------------------------------------------------
need=()
want() { command -v "$1" >/dev/null || need+=("$2"); }
want cmake cmake
want gcc gcc
want g++ g++
want ninja ninja-build
want pkg-config pkg-config
want python3 python3
for library in jansson:libjansson-dev criterion:libcriterion-dev; do
  if ! command -v pkg-config >/dev/null || ! pkg-config --exists "${library%%:*}"; then
    need+=("${library##*:}")
  fi
done
if [ "${1:-}" != quick ]; then
  want gcovr gcovr
  want clang-tidy clang-tidy
  want clang-format clang-format
  want cppcheck cppcheck
fi
has() {
  for p in python3 /usr/bin/python3; do ! "$p" -c "import $1" 2>/dev/null || return 0; done && false
}
# Tests that want these are skipped without, so they are no reason to stop where they can't be
# installed.
if [ "${1:-}" != quick ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  has numpy || need+=(python3-numpy)
  has jsonschema || need+=(python3-jsonschema)
fi
if ((${#need[@]})); then
  sudo=""
  [ "$(id -u)" -eq 0 ] || sudo=sudo
  if ! command -v apt-get >/dev/null || { [ -n "$sudo" ] && ! command -v sudo >/dev/null; }; then
    echo "tests/run.sh: please install ${need[*]} (Debian's names);" \
      "this script can do it with apt-get as root only" >&2
    exit 1
  fi
  echo "installing ${need[*]}"
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${need[@]}" \
    >/dev/null
fi

# The page's test wants a browser, which not every system has under that name.
if [ "${1:-}" != quick ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null &&
  ! command -v chromium chromium-browser google-chrome >/dev/null; then
  echo "installing chromium"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
    echo "there is no chromium to install: the page's test will be skipped"
fi

# ---- helpers -------------------------------------------------------------------------------------
say() { printf '\n== %s (%ds)\n' "$1" "$SECONDS"; }
build() { # folder, cmake options…
  local folder=$1
  shift
  local log generator=(-G Ninja)
  [ ! -f "$folder/CMakeCache.txt" ] || generator=() # examples/run.sh may have made it with another
  log=$(mktemp)
  if ! { cmake -S . -B "$folder" "${generator[@]}" -DREGRAPH_WERROR=ON -DREGRAPH_TESTS=ON "$@" &&
    cmake --build "$folder" --parallel "$jobs"; } >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}
# One test more than there are cores: some wait, for ranks that are late or for a terminal.
run_tests() { # folder, ctest options…
  local folder=$1 log
  shift
  log=$(mktemp)
  local status=0
  (cd "$folder" && ctest --output-on-failure --parallel $((jobs + 1)) --timeout 600 "$@") |
    tee "$log" || status=$?
  local all bad
  all=$(sed -n 's/.*tests failed out of \([0-9]*\).*/\1/p' "$log" | tail -1)
  bad=$(sed -n 's/.* \([0-9]*\) tests failed out of.*/\1/p' "$log" | tail -1)
  passed=$((passed + ${all:-0} - ${bad:-0}))
  failed=$((failed + ${bad:-0}))
  rm -f "$log"
  return "$status"
}
check() { # title, command…
  local title=$1
  shift
  if "$@"; then passed=$((passed + 1)); else
    failed=$((failed + 1))
    echo "FAILED: $title" >&2
  fi
}

# ---- beside the stages ---------------------------------------------------------------------------
# What takes long and holds nothing up runs with what the stages leave of the cores.
beside=()
trap '[ ${#beside[@]} -eq 0 ] || kill "${beside[@]}" 2>/dev/null || true' EXIT
wanted() { [[ " ${stages[*]} " == *" $1 "* ]]; }

# clang-tidy, by build/compile_commands.json as it is now: `install` makes it anew for a while.
tidy=""
begin_tidy() {
  # what is compiled with CUDA's headers, where the build has them
  local cuda=()
  grep -q cp/cuda_ build/compile_commands.json || cuda=(":!cp/cuda_*")
  tidy_log=$(mktemp) tidy_commands=$(mktemp -d)
  cp build/compile_commands.json "$tidy_commands"
  git ls-files "graph/*.c" "passes/*.c" "ops/*.c" "memplan/*.c" "recompute/*.c" "cp/*.c" \
    "exec/*.c" "report/*.c" "cli/*.c" "${cuda[@]}" |
    nice xargs -n 4 -P "$jobs" clang-tidy -p "$tidy_commands" --quiet --warnings-as-errors="*" \
      >"$tidy_log" 2>/dev/null &
  tidy=$!
  beside+=("$tidy")
}
end_tidy() {
  local status=0
  wait "$tidy" || status=$?
  cat "$tidy_log"
  rm -rf "$tidy_log" "$tidy_commands"
  return "$status"
}

# The adapters' packages; the registry's absence is no failure of ours.
adapters=""
begin_adapters() {
  adapters_log=$(mktemp)
  nice timeout 900 tests/adapters.sh install >"$adapters_log" 2>&1 </dev/null &
  adapters=$!
  beside+=("$adapters")
}

# ---- stages --------------------------------------------------------------------------------------
stage_release() {
  # With nvcc, few kernel instances: this shows that they build; tests/gpu.sh is what runs them, on
  # a GPU.
  build build -DCMAKE_BUILD_TYPE=Release -DREGRAPH_CUDA=AUTO \
    -DREGRAPH_KERNELS="${REGRAPH_KERNELS:-dev}"
  ! wanted static || begin_tidy
  run_tests build
  local status=0
  tests/python.sh build || status=$?
  [ "$status" -eq 77 ] || check "python" test "$status" -eq 0
  status=0
  tests/releases.py build || status=$?
  [ "$status" -eq 77 ] || check "releases" test "$status" -eq 0
}
lines="-DCMAKE_C_FLAGS_RELWITHDEBINFO=-O2 -g1 -DNDEBUG" # stack traces need no more
stage_sanitize() {
  build build-asan -DCMAKE_BUILD_TYPE=RelWithDebInfo "$lines" -DREGRAPH_CUDA=OFF \
    "-DREGRAPH_SANITIZE=address,undefined"
  ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
    run_tests build-asan
}
stage_threads() {
  build build-tsan -DCMAKE_BUILD_TYPE=RelWithDebInfo "$lines" -DREGRAPH_CUDA=OFF \
    -DREGRAPH_SANITIZE=thread
  TSAN_OPTIONS=halt_on_error=1 run_tests build-tsan
}
stage_coverage() {
  build build-cov -DCMAKE_BUILD_TYPE=None "-DCMAKE_C_FLAGS=-O1 -g1" -DREGRAPH_CUDA=OFF \
    -DREGRAPH_COVERAGE=ON
  find build-cov -name '*.gcda' -delete
  run_tests build-cov
  # the errors: a branch of the planner's that was taken -40 times (CMakeLists.txt); it is left out
  check "line coverage of host code is at least 90 %" \
    gcovr -j "$jobs" --root . --object-directory build-cov \
    --gcov-ignore-parse-errors \
    --filter '(graph|passes|ops|memplan|recompute|cp|exec|report|cli)/' \
    --exclude-unreachable-branches --print-summary --fail-under-line 90 -o build-cov/coverage.txt
}
stage_static() {
  [ -f build/compile_commands.json ] || build build -DCMAKE_BUILD_TYPE=Release
  [ -n "$tidy" ] || begin_tidy
  check "clang-format" bash -c \
    'git ls-files "*.c" "*.h" "*.cu" "*.cuh" | xargs clang-format --dry-run --Werror'
  check "lines of at most 100 columns" tests/columns.py
  check "cppcheck" cppcheck --quiet --error-exitcode=1 --std=c11 \
    --inline-suppr --suppressions-list=.cppcheck \
    -I include --enable=warning,performance,portability \
    -j "$jobs" graph passes ops memplan recompute cp exec report cli
}
stage_install() {
  [ -x build/regraph ] || build build -DCMAKE_BUILD_TYPE=Release
  check "installed tree" tests/install_test.sh build
  check "examples/run.sh" bash -c 'examples/run.sh >/dev/null'
}
stage_adapters() {
  [ -f build/libregraph.so ] || build build -DCMAKE_BUILD_TYPE=Release
  local until=$((SECONDS + 240))
  while kill -0 "$adapters" 2>/dev/null && [ "$SECONDS" -lt "$until" ]; do sleep 1; done
  if kill "$adapters" 2>/dev/null; then
    echo "SKIPPED: adapters: their packages were not there $SECONDS s after this script began"
  elif ! wait "$adapters"; then
    echo "SKIPPED: adapters: their packages can't be had: $(tail -n 3 "$adapters_log")"
  else
    check "adapters" tests/adapters.sh test build
  fi
  rm -f "$adapters_log"
}

! wanted adapters || begin_adapters
for stage in "${stages[@]}"; do
  declare -F "stage_$stage" >/dev/null || { echo "tests/run.sh: no stage '$stage'" >&2; exit 2; }
  say "$stage"
  "stage_$stage" || { [ "$failed" -gt 0 ] || failed=1; echo "FAILED: stage $stage" >&2; }
done
[ -z "$tidy" ] || check "clang-tidy" end_tidy
say "done"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

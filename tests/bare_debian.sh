#!/usr/bin/env bash
# What a newcomer meets on a bare Debian: README's two commands and `pip install .` of a fresh
# clone, in a system that debootstrap has just made. Takes root, debootstrap and a quarter of an
# hour; no part of tests/run.sh.
#   tests/bare_debian.sh [FOLDER]     FOLDER: where the system is, or is made (a temporary one, if
#                                     not said)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
system=${1:-}
if [ -z "$system" ]; then
  system=$(mktemp -d)
  trap 'rm -rf "$system"' EXIT
fi
if [ ! -x "$system/bin/sh" ]; then
  mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null |
    sed -n 's/^URIs: *//p; s/^deb *\([^ ]*\) .*/\1/p' | head -n 1 || true) # one of them may lack
  debootstrap --variant=minbase bookworm "$system" \
    "${mirror:?no Debian mirror in this machine\'s apt configuration}" >/dev/null
fi
# what this machine trusts, whatever stands between it and the registries
cp /etc/ssl/certs/ca-certificates.crt "$system/root/trusted.crt"
cp /etc/resolv.conf "$system/etc/"
# A command in the fresh clone, with nothing of this machine's environment but how to reach mirrors.
inside() {
  local keep=()
  while IFS= read -r word; do keep+=("$word"); done < \
    <(env | grep -E '^(https?_proxy|no_proxy|PIP_(INDEX_URL|DEFAULT_TIMEOUT))=' || true)
  keep+=(PIP_CERT=/root/trusted.crt)
  # /proc and /dev are seen in there as long as the command runs, and by nobody else
  env -i HOME=/root TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    "${keep[@]}" \
    unshare --mount bash -c 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" &&
      chroot "$0" bash -c "$1"' \
    "$system" "cd /root/regraph && $1"
}
step() { # title, command
  local began=$SECONDS
  if inside "$2" >"$system/root/log" 2>&1; then
    echo "ok      $1 ($((SECONDS - began)) s)"
  else
    tail -n 20 "$system/root/log"
    echo "FAILED  $1"
    exit 1
  fi
}
rm -rf "$system/root/regraph"
git clone -q "$root" "$system/root/regraph"
step "examples/run.sh" "./examples/run.sh"
step "examples/run.sh, again" "./examples/run.sh"
step "tests/run.sh quick" "./tests/run.sh quick"
step "packages that README's pip lines take" \
  "apt-get install -y -qq --no-install-recommends python3-venv python3-dev g++ cmake pkg-config \
    libjansson-dev"
step "pip install ." "rm -rf build && python3 -m venv /root/venv &&
  /root/venv/bin/pip install -q . && cd /root && venv/bin/regraph --version"
step "its tests" "export PYTHONDONTWRITEBYTECODE=1; cp -r python/tests /root/tests && cd /root &&
  venv/bin/python -m unittest -q tests/test_numpy.py tests/test_mistakes.py"
step "a mistake's words" "/root/venv/bin/regraph chekc x 2>&1 | grep 'did you mean'"

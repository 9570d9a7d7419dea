#!/usr/bin/env bash
# Creates .venv-sglang at the repository's root: SGLang and its router for servers on a CPU, for tests and small
# models. 2.4 GB, about 2 minutes. The versions are those of tools/sglang_cpu/constraints.txt; two libraries that have no
# CPU build in package indexes are replaced by stand-ins (tools/sglang_cpu/stand_ins). Safe to call again: it returns at
# once when nothing has changed. On GPUs install SGLang's own release instead, see docs/rollout.md.
#
#   PYTHON=...           interpreter to build it from (3.11 or newer; default: the first that fits)
#   TORCH_INDEX_URL=...  package index to take torch from, for example PyTorch's CPU index: the default
#                        index's Linux wheels of torch need several GB of CUDA libraries
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
parts=$root/tools/sglang_cpu
venv=${SGLANG_VENV:-$root/.venv-sglang}
log=$venv/setup.log
stamp=$venv/.stamp
free_needed_mib=4096

say() { printf 'sglang set-up: %s\n' "$*"; }
fail() {
  printf 'sglang set-up failed: %s\n' "$*" >&2
  exit 1
}
case "${1:-}" in
'') ;;
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
*)
  printf "sglang set-up: unknown argument '%s'; see --help\n" "$1" >&2
  exit 2
  ;;
esac

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

# What the environment was built from: a change in any of it, or a moved folder, means a new set-up.
fingerprint() {
  "$1" - "$venv" "$root" "${TORCH_INDEX_URL:-}" <<'PY'
import hashlib, pathlib, sys

venv, root, index = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
digest = hashlib.sha256(f"{venv}\n{index}\n".encode())
parts = root / "tools" / "sglang_cpu"
files = [path for path in sorted(parts.rglob("*")) if path.suffix in (".py", ".txt")]
for path in [root / "tools" / "setup_sglang_cpu.sh", *files]:
    digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
print(digest.hexdigest())
PY
}

install() {
  local what=$1 started=$SECONDS
  shift
  say "installing $what ..."
  # Without bytecode: most of these modules are never imported, and compiling them all takes longer than the rest.
  if ! "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-compile \
    -c "$parts/constraints.txt" "$@" >>"$log" 2>&1; then
    tail -n 30 "$log" >&2
    fail "pip could not install $what; its messages are above and in $log"
  fi
  say "$what: $((SECONDS - started)) s"
}

pins() {
  local name
  for name in "$@"; do
    grep -- "^$name==" "$parts/constraints.txt" || fail "no version of $name in tools/sglang_cpu/constraints.txt"
  done
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
# Everything but the lock, which this process holds.
find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
free_mib=$(df --output=avail --block-size=1M "$venv" | tail -n 1 | tr -d ' ')
[ "$free_mib" -ge "$free_needed_mib" ] ||
  fail "$venv has $free_mib MiB free and the set-up needs $free_needed_mib; free some, or name another folder: SGLANG_VENV=FOLDER"
say "$("$python" --version) at $python -> $venv"
"$python" -m venv "$venv" || fail "$python -m venv $venv did not work"

torch=$(pins torch)
# First and alone: with torch present nothing later asks the index for another build of it.
install "$torch" --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
install "what SGLang imports" "$torch" -r "$parts/requirements.txt"
# Their declared requirements are mostly CUDA libraries, which a CPU server never loads.
companions=$(pins sglang xgrammar apache-tvm-ffi triton sglang-router)
# shellcheck disable=SC2086  # one word per package
install "sglang, its router and compiled companions" --no-deps $companions

packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for name in torchvision sgl_kernel; do
  [ ! -e "$packages/$name" ] || fail "$packages/$name exists already: a real $name must not be overwritten by the stand-in"
  cp -r "$parts/stand_ins/$name" "$packages/$name"
done

say "checking ..."
if ! (cd "$venv" && env -u PYTHONPATH -u PYTHONDONTWRITEBYTECODE SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1 timeout 300 bin/python - \
  >>"$log" 2>&1 <<'PY'
import importlib.metadata as metadata

import sglang
import sglang.launch_server  # what a server runs
import sglang.srt.entrypoints.http_server
import sglang_router.launch_router

print("sglang", metadata.version("sglang"), "sglang-router", metadata.version("sglang-router"), "import")
PY
); then
  tail -n 30 "$log" >&2
  fail "SGLang was installed but cannot be imported; the error is above and in $log"
fi
fingerprint "$venv/bin/python" >"$stamp"
say "done in $((SECONDS - begun)) s; servers find it by themselves (rollout.sglang.python)"

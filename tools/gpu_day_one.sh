#!/usr/bin/env bash
# The first hour on a GPU: everything that a CPU cannot show, on a bare machine with one H100 or H200, in nine minutes.
#
#   tools/gpu_day_one.sh [OUT] [--only STAGE[,STAGE...]] [--rehearse] [--wheels FOLDER] [--budget SECONDS]
#
#   OUT         folder for day_one.jsonl (a line for each measurement, as it is made), day_one.txt (the table) and
#               day_one.log (everything that the stages print); default: $OUT, else runs/gpu_day_one
#   --only      env, kernels, tests, train, small, offload, server, or one part of them such as kernels.score
#   --rehearse  on a CPU: every stage builds its inputs at toy size and runs, or says what it needs
#   --wheels    install what tools/pack_gpu_wheels.sh has packed, for this run alone
#   --budget    seconds in all (default 530)
#
# The most decisive stages come first. Each runs in a process of its own with a limit of its own, so that one that hangs
# or crashes loses nothing of the others. A second call with the same OUT skips what is finished.
#
#   PYTHON=...  the interpreter that has torch (default: python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
fail() {
  printf 'gpu_day_one: %s\n' "$*" >&2
  exit 2
}
out='' wheels='' arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --rehearse) arguments+=(--rehearse) ;;
  --only | --budget | --wheels)
    [ $# -ge 2 ] || fail "$1 needs a value; see --help"
    if [ "$1" = --wheels ]; then wheels=$2; else arguments+=("$1" "$2"); fi
    shift
    ;;
  -*) fail "unknown argument '$1'; see --help" ;;
  *)
    [ -z "$out" ] || fail "two folders: $out and $1"
    out=$1
    ;;
  esac
  shift
done
out=${out:-${OUT:-$root/runs/gpu_day_one}}
command -v "$python" >/dev/null || fail "no $python on PATH; name the interpreter that has torch: PYTHON=/path/to/python3"
command -v timeout >/dev/null || fail "no timeout command (GNU coreutils) on PATH"
mkdir -p "$out"
work=${TMPDIR:-/tmp}/megatron_laser_day_one
mkdir -p "$work"

site=
if [ -n "$wheels" ]; then
  set -- "$wheels"/*.whl
  [ -e "$1" ] || fail "--wheels $wheels: no wheels there; tools/pack_gpu_wheels.sh makes the folder"
  site=$work/site
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --disable-pip-version-check \
    --root-user-action ignore --target "$site" "$@" || fail "pip could not install the wheels of $wheels, see above"
fi
"$python" -c 'import torch' 2>/dev/null || fail "$python cannot import torch; name the interpreter that can: PYTHON=/path/to/python3"
# Absolute, since stages run in other folders.
export PYTHONPATH="$root:$root/tools:$root/tests${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 KINETO_LOG_LEVEL=99
exec "$python" -m gpu_day_one "$(cd "$out" && pwd)" --work "$work" ${arguments[@]+"${arguments[@]}"}

#!/usr/bin/env bash
# Everything that a change must pass: formatting, lint, types, tests. Sets up .venv first, and .venv-sglang (2.4 GB) for
# the tests that talk to a real SGLang server; where that cannot be installed these are skipped, with the reason.
#
#   tools/test.sh                    all but the tests marked `long`
#   tools/test.sh --all              those too
#   tools/test.sh --no-sglang        without setting up .venv-sglang (after --all, if both are given)
#   tools/test.sh -k schedule -x     further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
selection=(-m "not long")
if [ "${1:-}" = --all ]; then
  selection=()
  shift
fi
with_sglang=yes
if [ "${1:-}" = --no-sglang ]; then
  with_sglang=
  shift
fi

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
# One thread each: the distributed tests start several processes, and torch would give each of them all cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nothing here may fetch a model or a data set.
export HF_HUB_OFFLINE=1

failed=()
check() {
  local started=$SECONDS
  printf '\n== %s\n' "$*"
  "$@" || failed+=("$*")
  printf '   %d s\n' $((SECONDS - started))
}
check ruff check .
check ruff format --check .
check mypy
if [ ${#failed[@]} -gt 0 ]; then
  printf '\nfailed before the tests:\n' >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi

printf '\n== SGLang for the tests that need a real server\n'
if [ -z "$with_sglang" ]; then
  printf '   not set up: --no-sglang\n'
elif [ -n "${MEGATRON_LASER_SGLANG_PYTHON:-}" ]; then
  printf '   MEGATRON_LASER_SGLANG_PYTHON=%s\n' "$MEGATRON_LASER_SGLANG_PYTHON"
elif ! bash tools/setup_sglang_cpu.sh; then
  printf '\n   NO SGLANG: it could not be installed, see above. The tests marked `sglang` are skipped.\n' >&2
fi

printf '\n== pytest %s\n' "${selection[*]} $*"
exec python -m pytest ${selection[@]+"${selection[@]}"} --durations=10 "$@"

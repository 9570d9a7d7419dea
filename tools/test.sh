#!/usr/bin/env bash
# Everything that a change must pass: formatting, lint, types, tests. Sets up .venv first, and beside it .venv-sglang
# (2.4 GB) for the tests that talk to a real SGLang server; where that cannot be installed these are skipped, with the
# reason. Tests run side by side on the machine's cores, at most four.
#
#   tools/test.sh                    all but the tests marked `long`
#   tools/test.sh --all              those too
#   tools/test.sh --fast             formatting, lint, types, and the quick tests: no real servers, no several ranks, none marked `slow`
#   tools/test.sh --no-sglang        without setting up .venv-sglang (after --all, if both are given)
#   tools/test.sh -k schedule -x     further arguments go to pytest; -n 0 runs one test after the other, for -s or --pdb
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
selection=(-m "not long")
numpy_1_selection=(-m "not long and not slow")
fast=
case "${1:-}" in
--all)
  selection=()
  numpy_1_selection=()
  shift
  ;;
--fast)
  fast=yes
  selection=(-m "not long and not slow and not distributed and not sglang")
  shift
  ;;
esac
with_sglang=yes
if [ "${1:-}" = --no-sglang ]; then
  with_sglang=
  shift
fi

logs=$(mktemp -d)
sglang_set_up=
numpy_1=
end() {
  local status=$? group
  trap - EXIT
  for group in $sglang_set_up $numpy_1; do
    kill -- "-$group" 2>/dev/null || true
  done
  rm -rf "$logs"
  exit "$status"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -n "$fast" ]; then
  no_sglang='not set up: --fast'
elif [ -z "$with_sglang" ]; then
  no_sglang='not set up: --no-sglang'
elif [ -n "${MEGATRON_LASER_SGLANG_PYTHON:-}" ]; then
  no_sglang="MEGATRON_LASER_SGLANG_PYTHON=$MEGATRON_LASER_SGLANG_PYTHON"
else
  no_sglang=
  set -m # a process group of its own, to end it as a whole
  bash tools/setup_sglang_cpu.sh >"$logs/sglang" 2>&1 </dev/null &
  sglang_set_up=$!
  set +m
fi

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)
workers=$((cores < 4 ? cores : 4))
# One thread each: the distributed tests start several processes, and torch would give each of them all cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# The tests start hundreds of interpreters: each reads what the first has compiled, as a user's do.
unset PYTHONDONTWRITEBYTECODE
# Nothing here may fetch a model or a data set.
export HF_HUB_OFFLINE=1

failed=()
check() {
  local started=$SECONDS
  printf '\n== %s\n' "$*"
  "$@" || failed+=("$*")
  printf '   %d s\n' $((SECONDS - started))
}
stop_if_failed() {
  if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed before the tests:\n' >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
  fi
}
check ruff check .
check ruff format --check .
stop_if_failed
if [ -z "$fast" ]; then # beside mypy, which has one process
  set -m
  bash tools/test_numpy_1.sh ${numpy_1_selection[@]+"${numpy_1_selection[@]}"} >"$logs/numpy_1" 2>&1 </dev/null &
  numpy_1=$!
  set +m
fi
check mypy
if [ -n "$numpy_1" ]; then
  started=$SECONDS
  printf '\n== tools/test_numpy_1.sh\n'
  wait "$numpy_1" || failed+=("tools/test_numpy_1.sh")
  numpy_1=
  cat "$logs/numpy_1"
  printf '   waited for %d s\n' $((SECONDS - started))
fi
stop_if_failed

printf '\n== SGLang for the tests that need a real server\n'
if [ -n "$no_sglang" ]; then
  printf '   %s\n' "$no_sglang"
else
  started=$SECONDS
  if wait "$sglang_set_up"; then
    cat "$logs/sglang"
  else
    cat "$logs/sglang" >&2
    printf '\n   NO SGLANG: it could not be installed, see above. The tests marked `sglang` are skipped.\n' >&2
  fi
  sglang_set_up=
  printf '   waited for %d s\n' $((SECONDS - started))
fi

printf '\n== pytest %s\n' "${selection[*]} $*"
trap - EXIT INT TERM # a signal is for pytest now, and bash would keep it until that has ended
rm -rf "$logs"
exec python -m pytest -n "$workers" ${selection[@]+"${selection[@]}"} --durations=10 "$@"

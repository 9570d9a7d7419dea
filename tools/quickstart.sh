#!/usr/bin/env bash
# Trains the tiny example twice on this machine's CPU, GRPO and LaSeR at the same time on one core each, and
# writes a report that puts them beside each other. Safe to run again: older runs are moved aside.
#
#   tools/quickstart.sh [--seed N] [--steps N]
#
#   --seed N    seed of both runs (default: the YAMLs')
#   --steps N   training steps of both runs (default: the YAMLs'); fewer than the warm-ups show no LaSeR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

example=examples/tiny_sum
runs=runs/tiny_sum
grpo_log=$runs/grpo.log
overrides=()

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
wrong_usage() {
  printf 'quickstart: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}
say() { printf '\n== %s\n' "$*"; }
number() {
  [[ "${2:-}" =~ ^[0-9]+$ ]] || wrong_usage "$1 needs a number, got '${2:-}'"
}

while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help)
    usage
    exit 0
    ;;
  --seed)
    number "$@"
    overrides+=("run.seed=$2")
    shift 2
    ;;
  --steps)
    number "$@"
    overrides+=("run.steps=$2")
    shift 2
    ;;
  *) wrong_usage "unknown argument '$1'" ;;
  esac
done

timings=()
timed() { timings+=("$(printf '%-34s %4d s' "$1" "$2")"); }

say "1/4 set-up"
started=$SECONDS
bash tools/setup_env.sh
timed set-up $((SECONDS - started))
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$runs"

prepare='' grpo='' laser=''

# Starts a command in the background, in a process group of its own (job control) so that it can be stopped
# together with its grading workers; without job control bash would also start it deaf to interrupts.
start() {
  set -m
  "$@" </dev/null &
  started_pid=$!
  set +m
}
alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# Interrupt first, so that Python leaves its `with` blocks and the live view gives the cursor back.
stop_children() {
  local pid deadline=$((SECONDS + 10))
  {
    for pid in $prepare $laser $grpo; do
      kill -INT -- "-$pid" || true
    done
    for pid in $prepare $laser $grpo; do
      while alive "$pid" && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
      kill -KILL -- "-$pid" || true
      wait "$pid" || true
    done
  } 2>/dev/null # bash would list each stopped job
  prepare='' grpo='' laser=''
  if [ -t 1 ]; then printf '\033[?25h'; fi
}
interrupted() {
  trap '' INT TERM HUP
  stop_children
  printf '\nquickstart: interrupted; everything it started is stopped\n' >&2
  exit 130
}
trap interrupted INT TERM HUP
trap stop_children EXIT

run_failed() {
  stop_children
  if [ "$1" = GRPO ]; then
    printf '\nquickstart: the GRPO run failed (exit status %d); the end of %s:\n' "$2" "$grpo_log" >&2
    tail -n 30 "$grpo_log" >&2
  else
    printf '\nquickstart: the LaSeR run failed (exit status %d), see above; GRPO was stopped, its log is %s\n' \
      "$2" "$grpo_log" >&2
  fi
  exit 1
}
grpo_progress() { printf '   GRPO: %s\n' "$(tail -n 1 "$grpo_log" 2>/dev/null | cut -c 1-150)"; }

say "2/4 base model and data: python $example/prepare.py"
started=$SECONDS
start python "$example/prepare.py"
prepare=$started_pid
wait "$prepare" || {
  printf '\nquickstart: %s/prepare.py failed, see above\n' "$example" >&2
  exit 1
}
prepare=''
timed "base model and data" $((SECONDS - started))

say "3/4 GRPO (log: $grpo_log) and LaSeR (below), at the same time"
started=$SECONDS
train() { start python -m megatron_laser train "$@" --overwrite ${overrides[@]+"${overrides[@]}"}; }
train "$example/grpo.yaml" run.output_dir="$runs/grpo" logging.live=off >"$grpo_log" 2>&1
grpo=$started_pid
train "$example/laser.yaml" run.output_dir="$runs/laser"
laser=$started_pid

shown=$SECONDS
while [ -n "$grpo$laser" ]; do
  sleep 1
  for name in GRPO LaSeR; do
    if [ "$name" = GRPO ]; then pid=$grpo; else pid=$laser; fi
    if [ -n "$pid" ] && ! alive "$pid"; then
      status=0
      wait "$pid" || status=$?
      if [ "$name" = GRPO ]; then grpo=''; else laser=''; fi
      [ "$status" -eq 0 ] || run_failed "$name" "$status"
      timed "$name" $((SECONDS - started))
    fi
  done
  # The live view owns the terminal while LaSeR runs; elsewhere lines do not disturb anybody.
  if [ -n "$grpo" ] && { [ -z "$laser" ] || [ ! -t 1 ]; } && [ $((SECONDS - shown)) -ge 20 ]; then
    grpo_progress
    shown=$SECONDS
  fi
done

say "4/4 report"
started=$SECONDS
python -m megatron_laser report "$runs/grpo" "$runs/laser" --output "$runs/report"
timed report $((SECONDS - started))

report=$runs/report/report.md
# The first table of the report.
awk '/^\|/ { print; seen = 1; next } seen { exit }' "$report"
say "report: $report"
printf '   plots:  %s\n' "$runs/report/plots/"
printf '   runs:   %s  %s\n' "$runs/grpo" "$runs/laser"
say "times"
printf '   %s\n' "${timings[@]}" "$(printf '%-34s %4d s' total $SECONDS)"

#!/usr/bin/env bash
# A run on Slurm whose trainer and rollout servers have nodes of their own: the first TRAIN_NODES of the job train, the
# others generate. The recipes' slurm.sh call it; it runs inside a job.
#
#   TRAIN_NODES=4 examples/launch/slurm_apart.sh RUN.yaml [section.key=value ...]
#
# Submit from the repository's root, on a file system that all nodes see. In a container (pyxis) set CONTAINER_IMAGE,
# and CONTAINER_MOUNTS for models, data and this repository. SIGUSR1 asks the trainer to save after its current step and
# to end.
set -euo pipefail

if [ $# -lt 1 ] || [ -z "${TRAIN_NODES:-}" ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?run this inside a Slurm job}")
rollout_nodes=$((${#hosts[@]} - TRAIN_NODES))
if [ "$rollout_nodes" -lt 1 ]; then
  echo "slurm_apart.sh: ${#hosts[@]} nodes, and $TRAIN_NODES of them train; at least one must be left to generate" >&2
  exit 2
fi
join() {
  local IFS=,
  echo "$*"
}
train_hosts=$(join "${hosts[@]:0:TRAIN_NODES}")
rollout_hosts=$(join "${hosts[@]:TRAIN_NODES}")
NNODES=$TRAIN_NODES
MASTER_ADDR=${hosts[0]}
# Two jobs that share a first node must not meet; ports from 32768 are handed out by the kernel.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export NNODES MASTER_ADDR MASTER_PORT

# shellcheck source=examples/launch/common.sh
source "$root/examples/launch/common.sh"
use_container "$root"

on() { # number of nodes, their names, command; for the background: it becomes srun, which takes signals to the nodes
  local count=$1 names=$2
  shift 2
  # One failed node ends the step: the others would only wait for their deadlines.
  exec srun --kill-on-bad-exit=1 --nodes="$count" --ntasks="$count" --nodelist="$names" ${container[@]+"${container[@]}"} "$@"
}

steps=()
stop() {
  trap '' INT TERM
  if [ ${#steps[@]} -gt 0 ]; then kill -TERM "${steps[@]}" 2>/dev/null || true; fi
  wait || true
}
trap stop EXIT
trap 'exit 130' INT TERM

on "$rollout_nodes" "$rollout_hosts" bash "$root/examples/launch/serve_node.sh" "$@" &
steps+=($!)
# SLURM_PROCID counts from 0 within the step: expanded on each node. All wait for the servers, which may take half an hour:
# torchrun would wait 900 seconds for the other nodes.
# shellcheck disable=SC2016
on "$TRAIN_NODES" "$train_hosts" bash -c '
  set -e
  root=$0 wait_for=$1
  shift
  export NODE_RANK=$SLURM_PROCID
  source "$root/examples/launch/common.sh"
  "$(find_python "$root")" -m megatron_laser serve "$@" --wait "$wait_for"
  exec "$root/examples/launch/node.sh" "$@"' "$root" "$rollout_nodes" "$@" &
trainer=$!
steps+=("$trainer")
# Whichever ends first ends the job: a run without servers waits for its deadline, servers without a run for nothing.
# Not by `wait -n`, which forgets what ended while a trap ran.
trap 'signalled=1; kill -USR1 "$trainer" 2>/dev/null || true' USR1
while :; do
  for step in "${steps[@]}"; do
    if ! kill -0 "$step" 2>/dev/null; then
      status=0
      await "$step" || status=$?
      exit "$status"
    fi
  done
  sleep 1 || true
done

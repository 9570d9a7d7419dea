#!/usr/bin/env bash
# A run on Slurm: one task per node, each starting one process per GPU.
#
#   sbatch --nodes 8 examples/launch/slurm.sh RUN.yaml [section.key=value ...]
#
# Submit it from the repository's root, on a file system that all nodes see. In a container (pyxis) set
# CONTAINER_IMAGE, and CONTAINER_MOUNTS for models, data and this repository. 900 seconds before the time limit the run
# is asked to save after its current step and to end; for longer steps: sbatch --signal=B:USR1@SECONDS.
#SBATCH --job-name=megatron-laser
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@900
set -euo pipefail

[ $# -ge 1 ] || {
  echo "usage: sbatch --nodes N examples/launch/slurm.sh RUN.yaml [section.key=value ...]" >&2
  exit 2
}
root=${SLURM_SUBMIT_DIR:?run this with sbatch}
[ -f "$root/examples/launch/node.sh" ] || {
  echo "slurm.sh: submit from the repository's root; $root/examples/launch/node.sh is not there" >&2
  exit 2
}
export NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs that share a first node must not meet; ports from 32768 are handed out by the kernel.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# shellcheck source=examples/launch/common.sh
source "$root/examples/launch/common.sh"
use_container "$root"

# One failed node ends the job: the others would only wait for their deadlines.
# shellcheck disable=SC2016  # SLURM_NODEID differs on each node: expanded there
step --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} \
  bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' "$root/examples/launch/node.sh" "$@"

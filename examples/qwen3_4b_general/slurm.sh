#!/usr/bin/env bash
# The recipe on Slurm, on one node: 4 GPUs train, 4 generate.
#
#   sbatch examples/qwen3_4b_general/slurm.sh [laser|grpo] [section.key=value ...]
#
# Submit it from the repository's root, on a file system that the node sees. In a container (pyxis) set
# CONTAINER_IMAGE, and CONTAINER_MOUNTS for models, data and this repository. 900 seconds before the time limit the run
# is asked to save after its current step and to end; for longer steps: sbatch --signal=B:USR1@SECONDS.
#SBATCH --job-name=qwen3_4b_general
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@900
set -euo pipefail

kind=${1:-laser}
[ $# -eq 0 ] || shift
root=${SLURM_SUBMIT_DIR:?run this with sbatch}
run=$root/examples/qwen3_4b_general/$kind.yaml
[ -f "$run" ] || {
  echo "slurm.sh: $run is not there; submit from the repository's root, with laser or grpo" >&2
  exit 2
}
# shellcheck source=examples/launch/common.sh
source "$root/examples/launch/common.sh"
use_container "$root"
step --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} \
  bash "$root/examples/launch/one_node.sh" "$run" "$@"

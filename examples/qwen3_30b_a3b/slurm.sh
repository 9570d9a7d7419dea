#!/usr/bin/env bash
# The recipe on Slurm: 4 nodes train, 4 generate.
#
#   sbatch examples/qwen3_30b_a3b/slurm.sh [laser|grpo] [section.key=value ...]
#
# Submit it from the repository's root, on a file system that all nodes see. In a container (pyxis) set
# CONTAINER_IMAGE, and CONTAINER_MOUNTS for models, data and this repository. 900 seconds before the time limit the run
# is asked to save after its current step and to end; for longer steps: sbatch --signal=B:USR1@SECONDS.
#SBATCH --job-name=qwen3_30b_a3b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@900
set -euo pipefail

kind=${1:-laser}
[ $# -eq 0 ] || shift
root=${SLURM_SUBMIT_DIR:?run this with sbatch}
run=$root/examples/qwen3_30b_a3b/$kind.yaml
[ -f "$run" ] || {
  echo "slurm.sh: $run is not there; submit from the repository's root, with laser or grpo" >&2
  exit 2
}
TRAIN_NODES=4 exec bash "$root/examples/launch/slurm_apart.sh" "$run" "$@"

#!/usr/bin/env bash
# One node's share of a run: starts one process per GPU with torchrun. Run it on every node, with the same
# arguments and the same repository path; slurm.sh and ssh.sh do that for you.
#
#   NNODES=8 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/launch/node.sh RUN.yaml [section.key=value ...]
#
#   NNODES              nodes of the run (default 1)
#   NODE_RANK           this node's number from 0; node 0 also generates and writes the output (default 0)
#   MASTER_ADDR         node 0's address on the cluster's private network (default 127.0.0.1, one node only)
#   MASTER_PORT         a free port of node 0 (default 29500)
#   PROCESSES_PER_NODE  default: the node's GPUs; without a GPU give it
#   PYTHON              default: that of .venv-gpu (tools/setup_gpu.sh), of .venv (tools/setup_env.sh), else python
#   JIT_CACHE           folder for compiled kernels, see common.sh
#
# SIGUSR1 asks the run to save after its current step and to end; torchrun would give it 30 seconds for that. Node 0 ends
# with the run's own status: 0 finished, 3 stopped and saved, so that it can be continued (docs/stopping.md).
set -euo pipefail

case "${1:-}" in
'' | -h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
  ;;
esac
fail() {
  printf 'node.sh: %s\n' "$*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
nodes=${NNODES:-1}
node_rank=${NODE_RANK:-0}
if [ "$nodes" -gt 1 ]; then
  [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $nodes: set MASTER_ADDR to node 0's address"
  [ -n "${NODE_RANK:-}" ] || fail "NNODES is $nodes: set NODE_RANK, 0 to $((nodes - 1))"
fi
processes=${PROCESSES_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$processes" -ge 1 ] || fail "no GPU found on $(hostname); set PROCESSES_PER_NODE to run on CPUs"
# shellcheck source=examples/launch/common.sh
source "$root/examples/launch/common.sh"
python=$(find_python "$root")

# Megatron overlaps tensor-parallel communication with compute by issuing kernels in one hardware queue;
# required with sequence parallelism on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A failed collective ends the process instead of hanging until run.deadline.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# Packed micro-batches have a new size each time. Servers on the same GPUs cannot be handed such memory.
if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ] && [[ "$*" != *colocated* ]] && ! grep -qs colocated "$1"; then
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
fi

# torchrun and its ranks ignore SIGUSR1, whoever sends it to all of them, until a rank listens to it.
trap '' USR1
# In the background: bash runs a trap only between two commands.
"$python" -m torch.distributed.run \
  --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$processes" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m megatron_laser train "$@" &
torchrun=$!
save_and_stop() {
  signalled=1
  # shellcheck disable=SC2046  # one word each
  kill -USR1 $(cat "/proc/$torchrun/task/"*/children) 2>/dev/null || true
}
trap save_and_stop USR1
trap 'signalled=1; kill -TERM "$torchrun" 2>/dev/null || true' TERM INT HUP
status=0
await "$torchrun" || status=$?
if [ "$node_rank" = 0 ]; then
  status_of_run=0
  run_status "$status" "$@" || status_of_run=$?
  status=$status_of_run
fi
exit "$status"

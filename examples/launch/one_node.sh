#!/usr/bin/env bash
# A run on one node whose trainer and rollout servers have GPUs of their own: starts the servers, waits until they
# answer, trains, and ends the servers.
#
#   examples/launch/one_node.sh RUN.yaml [section.key=value ...]
#
#   TRAIN_GPUS    GPUs of the trainer, one process each (default 0,1,2,3)
#   ROLLOUT_GPUS  GPUs of the servers, rollout.sglang.servers x tensor of them (default 4,5,6,7)
#   PYTHON        default: that of .venv-gpu (tools/setup_gpu.sh), of .venv (tools/setup_env.sh), else python
#   JIT_CACHE     folder for compiled kernels, see common.sh
#
# SIGUSR1 asks the trainer to save after its current step and to end; the servers end after it.
set -euo pipefail

case "${1:-}" in
'' | -h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
  ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=examples/launch/common.sh
source "$root/examples/launch/common.sh"
python=$(find_python "$root")
train_gpus=${TRAIN_GPUS:-0,1,2,3}
rollout_gpus=${ROLLOUT_GPUS:-4,5,6,7}

servers=''
stop() {
  trap '' INT TERM
  if [ -n "$servers" ]; then
    kill -TERM "$servers" 2>/dev/null || true
    wait "$servers" || true
  fi
}
trap stop EXIT
trap 'exit 130' INT TERM USR1

(
  trap '' USR1 # the trainer's
  CUDA_VISIBLE_DEVICES=$rollout_gpus exec "$python" -m megatron_laser serve "$@"
) &
servers=$!
# Ends at once when the servers do.
"$python" -m megatron_laser serve "$@" --wait 1 &
waiting=$!
while kill -0 "$waiting" 2>/dev/null; do
  if ! kill -0 "$servers" 2>/dev/null; then
    kill "$waiting" 2>/dev/null || true
    echo "one_node.sh: serve ended before its servers answered, see above" >&2
    exit 1
  fi
  sleep 1
done
wait "$waiting"

commas=${train_gpus//[^,]/}
# In the background: bash runs a trap only between two commands.
CUDA_VISIBLE_DEVICES=$train_gpus PROCESSES_PER_NODE=$((${#commas} + 1)) PYTHON=$python \
  "$root/examples/launch/node.sh" "$@" &
trainer=$!
trap 'kill -TERM "$trainer" 2>/dev/null || true; wait "$trainer" || true; exit 130' INT TERM
trap 'signalled=1; kill -USR1 "$trainer" 2>/dev/null || true' USR1
await "$trainer"

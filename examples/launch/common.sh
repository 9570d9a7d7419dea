#!/usr/bin/env bash
# Sourced by the scripts beside it: what trainer and servers must have in common, where kernels that are compiled at
# their first use are kept, and how signals find the trainer.
#
#   JIT_CACHE   folder for compiled kernels; unset: each tool's own place in HOME, which a container loses with its end.
#               It may be shared by the nodes when its file system has locks.

# Both sides of one NCCL communicator must choose memory the same way; SGLang sets 0 where a variable is unset, NCCL does
# not.
export NCCL_CUMEM_ENABLE=${NCCL_CUMEM_ENABLE:-0} NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

if [ -n "${JIT_CACHE:-}" ]; then
  export MEGATRON_LASER_CACHE=${MEGATRON_LASER_CACHE:-$JIT_CACHE/megatron_laser}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$JIT_CACHE/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$JIT_CACHE/inductor}
  export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$JIT_CACHE/cuda}
  export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$JIT_CACHE}
  export TVM_FFI_CACHE_DIR=${TVM_FFI_CACHE_DIR:-$JIT_CACHE/tvm_ffi}
  export SGLANG_CACHE_DIR=${SGLANG_CACHE_DIR:-$JIT_CACHE/sglang}
  export SGLANG_JIT_CACHE_DIR=${SGLANG_JIT_CACHE_DIR:-$JIT_CACHE/sglang/jit}
fi

# find_python ROOT: the interpreter of trainer and servers.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} "$1/.venv-gpu/bin/python" "$1/.venv/bin/python"; do
    if [ "$candidate" = "${PYTHON:-}" ] || [ -x "$candidate" ]; then
      printf '%s' "$candidate"
      return
    fi
  done
  printf 'python'
}

# use_container ROOT: `container`, srun's arguments for CONTAINER_IMAGE; empty without one.
use_container() {
  container=()
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    # shellcheck disable=SC2034  # for the script that sources this
    container=(--container-image "$CONTAINER_IMAGE" --container-mounts "${CONTAINER_MOUNTS:-$1:$1}" --container-workdir "$1")
    export JIT_CACHE=${JIT_CACHE:-$1/.jit_cache} # a container's HOME ends with it
  fi
}

# await PID: its exit status. A signal that this shell traps ends a wait, not what is waited for; its trap sets `signalled`.
await() {
  local status
  while :; do
    signalled='' status=0
    wait "$1" || status=$?
    if [ -z "$signalled" ]; then return "$status"; fi
  done
}

# run_status STATUS RUN.yaml [section.key=value ...]: what the run itself says of its end: 0 finished, 3 stopped and saved,
# 2 refused, 1 a crash (docs/stopping.md). STATUS where it says nothing. torchrun says 0 of a stop, and 1 after a signal.
run_status() {
  local status=$1 folder
  shift
  # shellcheck disable=SC2154  # of the script that sources this
  folder=$("$python" -c '
import sys
from megatron_laser.config import load_config
print(load_config(sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("--")]).run.output_dir)
' "$@" 2>/dev/null) || folder=''
  if [ -n "$folder" ]; then
    status=0
    "$python" -m megatron_laser status "$folder" --exit-status >/dev/null || status=$?
  fi
  return "$status"
}

# step ARGUMENT...: srun, which takes signals to its tasks. SIGUSR1 comes from Slurm before the time limit (--signal).
step() {
  srun "$@" &
  local step=$!
  # shellcheck disable=SC2064  # expanded here
  trap "signalled=1; kill -USR1 $step 2>/dev/null || true" USR1
  # shellcheck disable=SC2064
  trap "signalled=1; kill -TERM $step 2>/dev/null || true" TERM INT
  await "$step"
}

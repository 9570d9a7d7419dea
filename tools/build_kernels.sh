#!/usr/bin/env bash
# Compiles the CUDA C++ kernel for Hopper ahead of time and prints where the cubin is. Without this it happens on the
# first use. Needs nvcc or the Python package nvidia-cuda-nvrtc, no GPU; MEGATRON_LASER_CACHE names another folder than
# ~/.cache/megatron_laser.
set -euo pipefail

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m megatron_laser.ops.cuda.build

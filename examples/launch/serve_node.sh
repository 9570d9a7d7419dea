#!/usr/bin/env bash
# A rollout node's share of a run: its servers, bound to the node's own address on the private network.
#
#   examples/launch/serve_node.sh RUN.yaml [section.key=value ...]
#
#   ROLLOUT_HOST  the address (default: what this node's name resolves to)
#   PYTHON        default: that of .venv-gpu (tools/setup_gpu.sh), of .venv (tools/setup_env.sh), else python
#   JIT_CACHE     folder for compiled kernels, see common.sh
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
host=${ROLLOUT_HOST:-$(getent ahostsv4 "$(hostname)" | awk '{ print $1; exit }')}
case "$host" in
'' | 127.*)
  echo "serve_node.sh: $(hostname) resolves to '${host:-nothing}', which other nodes cannot reach; set ROLLOUT_HOST" >&2
  exit 2
  ;;
esac
trap '' USR1 # the trainer's
exec "$python" -m megatron_laser serve "$@" "rollout.sglang.host=$host"

#!/usr/bin/env bash
# A run over plain ssh: starts node.sh on each host and stops all of them when one fails or on Ctrl-C.
#
#   examples/launch/ssh.sh HOSTFILE RUN.yaml [section.key=value ...]
#
# HOSTFILE has one host a line; the first becomes node 0 and must be reachable from the others by that name
# (or set MASTER_ADDR). Needs key-based login and the repository at the same path on every host. MASTER_PORT,
# PROCESSES_PER_NODE, PYTHON, JIT_CACHE and variables that begin with NCCL_ are passed on.
set -euo pipefail

[ $# -ge 2 ] || {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
}
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$1")
[ ${#hosts[@]} -ge 1 ] || {
  echo "ssh.sh: no host in $1" >&2
  exit 2
}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

passed=()
for name in MASTER_PORT PROCESSES_PER_NODE PYTHON JIT_CACHE $(compgen -e | grep '^NCCL_' || true); do
  if [ -n "${!name:-}" ]; then passed+=("$name=${!name}"); fi
done

pids=()
stop() {
  trap '' INT TERM
  # Closing the connection hangs up the remote terminal, and with it torchrun and its processes.
  if [ ${#pids[@]} -gt 0 ]; then kill "${pids[@]}" 2>/dev/null || true; fi
  wait || true
}
trap stop EXIT
trap 'exit 130' INT TERM

for index in "${!hosts[@]}"; do
  command=$(printf '%q ' env "NNODES=${#hosts[@]}" "NODE_RANK=$index" "MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}" \
    ${passed[@]+"${passed[@]}"} bash "$root/examples/launch/node.sh" "$@")
  # A terminal (-tt) ties the remote processes to this connection.
  "${SSH:-ssh}" -tt -o BatchMode=yes -o ServerAliveInterval=30 "${hosts[$index]}" "cd $(printf %q "$PWD") && $command" \
    </dev/null > >(sed -u "s/^/[${hosts[$index]}] /") 2>&1 &
  pids+=($!)
done

# The first to fail ends the run, with its status.
running=("${!pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  sleep 1
  still=()
  for index in "${running[@]}"; do
    if kill -0 "${pids[$index]}" 2>/dev/null; then
      still+=("$index")
      continue
    fi
    status=0
    wait "${pids[$index]}" || status=$?
    if [ "$status" -ne 0 ]; then
      echo "ssh.sh: ${hosts[$index]} ended with status $status; stopping the others" >&2
      exit "$status"
    fi
  done
  running=(${still[@]+"${still[@]}"})
done

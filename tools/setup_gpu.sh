#!/usr/bin/env bash
# Makes the GPU environment: one interpreter for the trainer and the rollout servers, with one torch and one NCCL. The
# Dockerfile runs the same steps. Stopped half-way it goes on where it was; a step is done again when what it is made
# from has changed. Never run on a GPU machine yet: the steps' commands are tested, their effect there is not.
#
#   tools/setup_gpu.sh                  all steps
#   tools/setup_gpu.sh --dry-run        prints what each step would do, and changes nothing
#   tools/setup_gpu.sh --only STEP      one of: machine venv packages transformer-engine package check
#   tools/setup_gpu.sh --venv FOLDER    where (default: .venv-gpu at the repository's root)
#   PYTHON=...                          interpreter to build from (3.12; default: python3.12, else python3)
#   MAX_JOBS=...                        compilers at a time for Transformer Engine (default: 8; each takes some 4 GB)
#
# Needs: driver 580 or newer, the CUDA 13 toolkit (nvcc), Python 3.12 with venv or pip, a C++ compiler, a package index,
# 25 GB of disk. Afterwards: . .venv-gpu/bin/activate; megatron-laser env
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
steps=(machine venv packages transformer-engine package check)
venv=$root/.venv-gpu
only= dry=
min_driver=580

say() { printf 'set-up: %s\n' "$*"; }
fail() {
  printf 'set-up failed: %s\n' "$*" >&2
  exit 1
}
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help) usage && exit 0 ;;
  --dry-run) dry=yes ;;
  --only)
    only=${2:-}
    [[ $only != *' '* && " ${steps[*]} " == *" $only "* ]] || fail "--only $only: expected one of ${steps[*]}"
    shift
    ;;
  --venv)
    venv=${2:-}
    [ -n "$venv" ] || fail "--venv needs a folder"
    [[ $venv == /* ]] || venv=$PWD/$venv # compilers, which get it, run in other folders
    shift
    ;;
  *) fail "$1 is no option; see --help" ;;
  esac
  shift
done

# Prints the command, and runs it unless this is a dry run.
run() {
  printf '  + %s\n' "$*"
  [ -n "$dry" ] || "$@"
}

base_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not Python 3.12, for which tools/gpu/constraints.txt was resolved"
  done
  fail "no Python 3.12 on PATH; install one, or name it: PYTHON=/path/to/python3.12"
}

cuda_home() {
  if [ -n "${CUDA_HOME:-}" ]; then
    printf '%s' "$CUDA_HOME"
  elif command -v nvcc >/dev/null; then
    dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")"
  else
    printf '/usr/local/cuda'
  fi
}

# An image's own constraints are for its own packages. Arguments before -- are variables.
pip() {
  local variables=()
  while [ "$1" != -- ]; do
    variables+=("$1")
    shift
  done
  shift
  run env -u PIP_CONSTRAINT -u PYTHONPATH ${variables[@]+"${variables[@]}"} \
    "$venv/bin/python" -m pip install --no-input -c "$root/tools/gpu/constraints.txt" "$@"
}

# A folder inside the environment, known before it is there: --dry-run prints it.
site() { printf '%s/lib/python3.12/site-packages' "$venv"; }

do_machine() {
  local driver release problems=()
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  if ! [[ $driver =~ ^[0-9]+\. ]]; then # what fails in nvidia-smi, it writes to the same place
    problems+=("nvidia-smi finds no driver${driver:+ ($driver)}; install the NVIDIA driver $min_driver or newer")
  elif [ "${driver%%.*}" -lt $min_driver ]; then
    problems+=("driver $driver is too old for CUDA 13; install $min_driver or newer")
  fi
  release=$("$(cuda_home)/bin/nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p') || true
  if [ "$release" != 13 ]; then
    problems+=("$(cuda_home)/bin/nvcc is ${release:+of CUDA }${release:-not there}; install the CUDA 13 toolkit, or set CUDA_HOME to it")
  fi
  command -v "${CXX:-c++}" >/dev/null || problems+=("no C++ compiler (${CXX:-c++}) on PATH; install g++")
  (base_python) >/dev/null 2>&1 || problems+=("$( (base_python) 2>&1 | sed 's/^set-up failed: //')")
  [ ${#problems[@]} -eq 0 ] && say "driver $driver, CUDA $release, $(base_python)" && return
  printf 'set-up: this machine: %s\n' "${problems[@]}" >&2
  [ -n "$dry" ] || fail "${#problems[@]} things are missing, see above"
}

do_venv() {
  local python
  if [ -n "$dry" ]; then
    python=$(base_python 2>/dev/null) || python=python3.12
  else
    python=$(base_python) || exit 1
  fi
  if [ -n "$dry" ] || "$python" -c 'import ensurepip' 2>/dev/null; then
    run "$python" -m venv "$venv"
  else # Debian's Python without python3-venv, as in some images: the environment gets pip from outside.
    run "$python" -m venv --without-pip "$venv"
    run env -u PIP_CONSTRAINT "$python" -m pip --python "$venv/bin/python" install --no-input pip ||
      fail "$python has neither ensurepip nor a pip of its own; on Debian and Ubuntu install python3-venv"
  fi
}

do_packages() { pip -- -r "$root/tools/gpu/requirements.txt"; }

# NVTE_PYTORCH_FORCE_BUILD: otherwise it takes a wheel that was built for another torch, chosen by NVIDIA_PYTORCH_VERSION
# where an NGC image sets that. NVTE_WITH_NCCL_EP: expert parallelism through NCCL, not used. CPATH: cuDNN's and NCCL's
# headers of the very libraries that torch loads.
do_transformer_engine() {
  local version
  version=$(sed -n 's/^transformer-engine==//p' "$root/tools/gpu/constraints.txt")
  pip NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 "CUDA_HOME=$(cuda_home)" "MAX_JOBS=${MAX_JOBS:-8}" \
    "CPATH=$(site)/nvidia/cudnn/include:$(site)/nvidia/nccl/include${CPATH:+:$CPATH}" \
    -- --no-build-isolation --no-binary=transformer_engine_torch "transformer_engine_torch==$version"
}

do_package() { pip -- --no-build-isolation --editable "$root[gpu]"; }

do_check() { run env -u PYTHONPATH "$venv/bin/python" "$root/tools/gpu/check.py"; }

# What a step is made from: it is done again when that, or an earlier step, has changed.
fingerprint() {
  {
    printf '%s\n' "$1" "$venv" "$(cuda_home)"
    cat "$root/tools/gpu/requirements.txt" "$root/tools/gpu/constraints.txt" "$root/tools/setup_gpu.sh"
    [ "$1" != package ] || cat "$root/setup.py"
  } | sha256sum | cut -d ' ' -f 1
}

for step in "${steps[@]}"; do
  [ -z "$only" ] || [ "$only" = "$step" ] || continue
  stamp=$venv/.done-$step
  if [ "$step" != machine ] && [ "$step" != check ] && [ -z "$dry" ] &&
    [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$step")" ]; then
    say "$step: done before"
    continue
  fi
  say "$step"
  started=$SECONDS
  "do_${step//-/_}" || fail "$step did not work; what it ran is above"
  if [ -z "$dry" ]; then
    [ ! -d "$venv" ] || fingerprint "$step" >"$stamp"
    say "$step: $((SECONDS - started)) s"
  fi
done

#!/usr/bin/env bash
# On a machine with an H100 or H200: everything about the log-prob kernels that a CPU cannot show.
#
#   tools/prove_kernels.sh [FOLDER]     default: docs/measurements/logprob
#
# Compiles all kernels and prints what they use, runs the GPU tests (bf16 against float64, bitwise repeatable, peak
# memory), then both benchmarks with every contender that is installed (pip install liger-kernel cut-cross-entropy).
# FOLDER gets logprob.json, logprob.png, score.json, score.png and the printed tables. Needs torch with CUDA and triton.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-docs/measurements/logprob}
python=${PYTHON:-python}
mkdir -p "$folder"
"$python" tools/inspect_kernels.py | tee "$folder/kernels.txt"
"$python" -m pytest -m gpu tests/gpu tests/unit/test_step_memory.py
"$python" -m megatron_laser bench logprob --output "$folder" | tee "$folder/logprob.txt"
"$python" -m megatron_laser bench score --output "$folder" | tee "$folder/score.txt"

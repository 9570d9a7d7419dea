#!/usr/bin/env bash
# Runs the tests that depend on NumPy with NumPy 1.26, which GPU images still bring, and a pyarrow that takes it. Both are
# installed once into build/numpy-1, in front of what the environment has; nothing of the environment changes.
#
#   tools/test_numpy_1.sh                 further arguments go to pytest
#   PYTHON=...                            interpreter with this package's requirements (default: .venv's)
#   MEGATRON_LASER_NUMPY_1=FOLDER         folder to install into (default: build/numpy-1)
#
# Exit status: pytest's; 0 with a reason where the two cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac

python=${PYTHON:-.venv/bin/python}
folder=${MEGATRON_LASER_NUMPY_1:-build/numpy-1}
wanted="numpy==1.26.4 pyarrow==25.0.1"
# What writes, reads, packs or counts arrays.
files=(
  tests/unit/test_bad_steps.py
  tests/unit/test_calibration.py
  tests/unit/test_data_readers.py
  tests/unit/test_data_cursor.py
  tests/unit/test_evaluation_detail.py
  tests/unit/test_importance_mask.py
  tests/unit/test_metrics_logger.py
  tests/unit/test_packing.py
  tests/unit/test_prepare_data.py
  tests/unit/test_replay.py
  tests/unit/test_step_data.py
  tests/unit/test_verification_metrics.py
  tests/unit/test_voting.py
  tests/unit/test_weight_buckets.py
  tests/distributed/test_broadcast.py
)

stamp="$wanted $("$python" -c 'import sys; print(sys.version)')"
if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
  rm -rf "$folder"
  mkdir -p "$folder"
  # shellcheck disable=SC2086 # two words
  if ! timeout 300 "$python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-compile \
    --only-binary=:all: --target "$folder" $wanted >"$folder/pip.log" 2>&1; then
    tail -n 3 "$folder/pip.log" >&2
    printf 'SKIPPED: %s cannot be installed (no package index, or no wheels for this Python)\n' "$wanted"
    exit 0
  fi
  printf '%s\n' "$stamp" >"$folder/.stamp"
fi

export PYTHONPATH="$(cd "$folder" && pwd):$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$python" -c 'import numpy, pyarrow.parquet as p; import pyarrow; print("NumPy", numpy.__version__, "pyarrow", pyarrow.__version__)
assert numpy.__version__.startswith("1.26."), numpy.__file__'
exec "$python" -m pytest -q -m "not long" "${files[@]}" "$@"

"""The log-prob op on two tensor-parallel ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("linear_logprob_tp_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_two_vocabulary_shards_equal_one_rank_with_and_without_sequence_parallel():
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(WORKER),
    ]
    result = subprocess.run(
        command, env=environment, timeout=150, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout[-4000:]

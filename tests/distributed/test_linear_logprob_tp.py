"""The log-prob op on two tensor-parallel ranks."""

from pathlib import Path

import pytest
from helpers.ranks import run_ranks

WORKER = Path(__file__).with_name("linear_logprob_tp_worker.py")


@pytest.mark.distributed
def test_two_vocabulary_shards_equal_one_rank_with_and_without_sequence_parallel():
    run_ranks(WORKER, 2)

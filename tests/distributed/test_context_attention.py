"""Context parallelism's attention and rotary embedding agree with whole sequences, gradients included."""

from pathlib import Path

import pytest
from helpers.ranks import run_ranks

WORKER = Path(__file__).with_name("context_attention_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_attention_and_rotary_embedding_of_split_sequences_are_those_of_whole_ones(processes):
    run_ranks(WORKER, processes, timeout=120)

"""Tokens with sets on tensor-, sequence- and context-parallel ranks."""

from pathlib import Path

import pytest
from helpers.models import save_tiny_model
from helpers.ranks import run_ranks

WORKER = Path(__file__).with_name("trainer_sets_worker.py")


@pytest.mark.distributed
def test_two_ranks_train_on_sets_as_a_plain_implementation_does(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2")
    run_ranks(WORKER, 2, tmp_path, tmp_path / "model")

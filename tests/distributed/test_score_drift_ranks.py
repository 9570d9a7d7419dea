"""The drift of the score in layouts of two ranks."""

from pathlib import Path

import pytest
from helpers.models import save_tiny_model
from helpers.ranks import run_ranks

WORKER = Path(__file__).with_name("score_drift_worker.py")


@pytest.mark.distributed
def test_two_ranks_measure_what_a_plain_model_with_their_weights_gives(tmp_path):
    for family in ("qwen2", "qwen3-moe"):
        save_tiny_model(tmp_path / family, family)
    run_ranks(WORKER, 2, tmp_path, tmp_path)

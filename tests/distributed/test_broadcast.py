"""What rank 0 sends to all ranks, and what all ranks send back."""

from pathlib import Path

import numpy as np
import pytest
from helpers.models import save_tiny_model
from helpers.ranks import run_ranks

WORKER = Path(__file__).with_name("broadcast_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_arrays_sums_and_weights_reach_the_right_ranks_under_every_layout(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2-tied")
    run_ranks(WORKER, 2, tmp_path)


def test_one_process_keeps_its_arrays(single_process):
    from megatron_laser.distributed.broadcast import broadcast_arrays

    arrays = {"a": np.arange(3)}
    assert broadcast_arrays(arrays, single_process) is arrays

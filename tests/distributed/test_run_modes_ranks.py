"""Batches of two ranks: recorded, and trained on again by two ranks."""

import pytest
from helpers.ranks import train_on_ranks
from helpers.tiny_run import metrics_without_times, write_tiny_run

pytestmark = pytest.mark.distributed


def test_two_ranks_that_train_on_recorded_batches_are_the_run_that_made_them_bitwise(tmp_path):
    file = write_tiny_run(tmp_path, run={"steps": 3}, checkpoint={"every": 0})
    train_on_ranks(
        file, "run.output_dir=" + str(tmp_path / "a"), "logging.record_batches_every=1", processes=2
    )
    settings = [
        "run.mode=train_only",
        f"run.batches={tmp_path / 'a' / 'batches'}",
        "data.train=nowhere.jsonl",
    ]
    output = train_on_ranks(file, "run.output_dir=" + str(tmp_path / "b"), *settings, processes=2)
    assert "this was no ordinary run: train_only" in output
    there, here = metrics_without_times(tmp_path / "b"), metrics_without_times(tmp_path / "a")
    assert there == here and len(here) == 3

"""A run that was started on Megatron-Core 0.16.1 goes on: tests/data/run_of_megatron_core_0_16.

The folder is `write_tiny_run` after two of four steps; expected_metrics.jsonl is what 0.16.1 recorded of all four.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_run import metrics_without_times

from megatron_laser.config import load_config
from megatron_laser.loop import train

RECORDED = Path(__file__).parents[1] / "data" / "run_of_megatron_core_0_16"
FORMER_FOLDER = "/tmp/mcore_0_16"
NO_LONGER = {"kl_loss"}  # of a run without a KL term
NEW = {
    "accuracy_tried",
    "groups_dropped_right",
    "groups_dropped_wrong",
    "grading_failed",
    "rank_imbalance",
} | {f"pass_at_{k}" for k in (1, 2, 4)}


@pytest.fixture
def interrupted(tmp_path):
    """The YAML file of the recorded run, moved to a folder of its own."""
    folder = tmp_path / "run"
    shutil.copytree(RECORDED, folder)
    for name in ("out/run.json", "out/config.yaml"):
        file = folder / name
        text = file.read_text()
        assert FORMER_FOLDER in text
        file.write_text(text.replace(FORMER_FOLDER, str(folder)))
    return folder / "run.yaml"


def test_a_run_of_megatron_core_0_16_continues_to_the_numbers_it_would_have_had(interrupted, monkeypatch):
    # Tokens were drawn by it at that time.
    monkeypatch.setattr(
        "megatron_laser.rollout.in_process.draw",
        lambda probabilities, generator: torch.multinomial(probabilities, 1, generator=generator).squeeze(1),
    )
    out = train(load_config(interrupted))
    expected = [json.loads(line) for line in (RECORDED / "expected_metrics.jsonl").read_text().splitlines()]
    got = metrics_without_times(out)
    assert [line["step"] for line in got] == [1, 2, 3, 4]
    for line, want in zip(got, expected, strict=True):
        measured = {name for name in want if not name.startswith(("time/", "memory/"))}
        assert measured - line.keys() <= NO_LONGER and line.keys() - measured <= NEW
        for name, value in ((name, line[name]) for name in line.keys() & measured):
            if isinstance(value, (list, float)):
                assert value == pytest.approx(want[name], rel=1e-4, abs=1e-6), (line["step"], name)
            else:
                assert value == want[name], (line["step"], name)

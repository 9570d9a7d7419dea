"""Two ranks save the best, export and end early together, and have the steps that rank 0 has made of epochs."""

import json

import pytest
from helpers.ranks import train_on_ranks
from helpers.tiny_run import metrics_without_times, write_tiny_run

from megatron_laser.trainer.checkpoint import folder as folders

pytestmark = pytest.mark.distributed


def test_two_ranks_keep_the_best_and_end_early_together(tmp_path):
    file = write_tiny_run(
        tmp_path,
        data={"validation": "train.jsonl"},
        evaluation={"every": 2, "max_prompts": 2},  # always two responses: never more of them than before
        checkpoint={
            "every": 3,
            "keep_last": 1,
            "export_every": 2,
            "best": {"metric": "eval/num_responses", "mode": "max"},
        },
        run={"epochs": 2.4, "steps": None, "early_stop": {"metric": "eval/num_responses", "patience": 1}},
    )
    output = train_on_ranks(file, processes=2)
    out = tmp_path / "out"
    assert "run.epochs 2.4 at 4 problems a step: 15 steps" in output
    assert "finished early after step 4 of 15" in output
    assert [row["step"] for row in metrics_without_times(out)] == [1, 2, 3, 4]
    assert [step for step, _ in folders.published(out / "checkpoints")] == [2, 4]
    assert json.loads((out / "best.json").read_text())["step"] == 2
    assert sorted(path.name for path in out.glob("hf_*")) == ["hf_step_2", "hf_step_4"]

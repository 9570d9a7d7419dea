"""metrics.jsonl, TensorBoard and rollout dumps."""

from __future__ import annotations

import builtins
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_laser import files as plain_module
from megatron_laser.files import write_atomically
from megatron_laser.observability.metrics_logger import MetricsLogger, read_metrics
from megatron_laser.observability.rollout_dump import dump_rollouts
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.log(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    logger.close()
    logger.close()


def test_numpy_and_torch_values_are_written_as_plain_numbers(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(
            1,
            {
                "numpy": np.float32(0.5),
                "torch": torch.tensor(2, dtype=torch.int32),
                "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
                "list": np.array([0.25, np.nan]),
            },
        )
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "numpy": 0.5, "torch": 2, "bfloat16": 1.5, "list": [0.25, None]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(math.nan)])
def test_what_json_cannot_hold_is_written_as_null_and_read_as_nan(tmp_path: Path, value: Any) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"f1": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "f1": None}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["f1"])


def test_a_nested_metric_is_refused_by_name(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        with pytest.raises(TypeError, match=r"metric 'outcomes'.*metrics are flat"):
            logger.log(1, {"outcomes": {"correct": 1}})
        logger.log(2, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_a_resumed_run_continues_the_file_after_a_line_that_was_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(2, {"loss": 2.5})
    with caplog.at_level(logging.WARNING):
        rows = read_metrics(path)
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]
    assert "line 3" in caplog.text


def test_resuming_from_a_checkpoint_cuts_off_the_steps_after_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with MetricsLogger(tmp_path, tensorboard=False, last_step=1) as logger:
        logger.log(2, {"loss": 2.5})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.5}\n'


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": 0.5, "f1": math.nan, "quantiles": [0.1, 0.2]})
        logger.log(2, {"loss": np.float32(0.25)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_a_missing_tensorboard_is_one_warning_and_no_crash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_tensorboard(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with caplog.at_level(logging.WARNING), MetricsLogger(tmp_path) as logger:
        logger.log(1, {"loss": 0.5})
        logger.log(2, {"loss": 0.4})
    assert len(caplog.records) == 1
    assert "logging.tensorboard" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def batch_of_two() -> RolloutBatch:
    samples = [
        Sample([1, 2], Generation([3, 0], [-0.5, -1.5], "stop", 4), "the text é", True, 1.0, "correct", -3.0),
        Sample([1, 2], Generation([3, 3], [-1.0, -1.0], "length", 4), "cut", False, 0.0, "no_answer"),
    ]
    return RolloutBatch(5, 4, [Group(Prompt(7, "problem", "42", [1, 2]), samples)])


def test_a_rollout_dump_has_one_readable_line_for_each_response(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_5.jsonl"
    dump_rollouts(path, batch_of_two(), torch.tensor([0.75, math.nan]), np.array([0.5, -0.5]))
    assert "the text é" in path.read_text()
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["row"], first["sample"], first["score"], first["advantage"]) == (7, 0, 0.75, 0.5)
    assert (first["mean_logprob"], first["response_ids_length"], first["zc_logprob"]) == (-1.0, 2, -3.0)
    assert (second["sample"], second["score"], second["finish_reason"]) == (1, None, "length")


def test_a_rollout_dump_refuses_scores_of_another_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scores has 1 entries for 2 samples of step 5"):
        dump_rollouts(tmp_path / "a.jsonl", batch_of_two(), [0.5], [0.5, 0.5])


def test_a_file_is_old_or_new_but_never_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(plain_module.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_score_histograms_reach_tensorboard_and_empty_ones_are_left_out(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path) as logger:
        logger.histograms(3, {"score/right": [0.9, 1.1, 0.7], "score/wrong": []})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["histograms"] == ["score/right"]
    assert events.Histograms("score/right")[0].histogram_value.num == 3

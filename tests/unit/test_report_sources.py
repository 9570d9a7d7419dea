"""What report and live view say of each source of the data, and of a run whose readouts have warm-ups of their own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from megatron_laser.observability.live_view import LiveView, plain_line
from megatron_laser.observability.metrics_logger import MetricsLogger
from megatron_laser.observability.source_metrics import later_metrics, metrics_by_source
from megatron_laser.report.run_data import load_runs
from megatron_laser.report.run_report import write_report
from megatron_laser.report.source_table import source_table

PAINTED = True  # see helpers/pictures.py


def write_run(folder: Path, sources: tuple[str, ...], *, steps: int = 40, laser: dict | None = None) -> Path:
    """Source i rises from 0.1 (i + 1) by 0.01 a step, and is missing in every third step but in the first one."""
    folder.mkdir(parents=True)
    config = {"run": {"name": folder.name}, "laser": laser or {"enabled": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsLogger(folder, tensorboard=False) as metrics:
        for step in range(1, steps + 1):
            line = {"reward_mean": 0.2 + 0.01 * step, "time/total": 1.0}
            for index, name in enumerate(sources):
                if index and step % 3 == 0:
                    continue
                line[f"source/{name}/reward_mean"] = 0.1 * (index + 1) + 0.01 * step
                line[f"source/{name}/response_length_mean"] = 100.0 * (index + 1)
                line[f"source/{name}/self_reward_f1"] = 0.02 * step
            if sources and step == steps:
                line |= {f"eval/source/{name}/accuracy": 0.5 for name in sources}
            metrics.log(step, line)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    run = write_run(folder / "mixed", ("algebra", "geo|metry"))
    evaluations = run / "evaluation"
    evaluations.mkdir()
    for split, step, value in (("validation", 0, 0.25), ("validation", 40, 0.375), ("test", 40, 0.625)):
        summary = {"accuracy": 0.5, "source/algebra/accuracy": value, "source/geo|metry/majority": value / 2}
        (evaluations / f"{split}_step_{step}.json").write_text(json.dumps(summary))
    return run, write_run(folder / "plain", ())


def test_the_report_has_a_row_for_each_source_of_each_run_that_has_several(two):
    header, _, *rows = source_table(load_runs(two)).splitlines()
    assert header == (
        "| Run | Source | Accuracy of rollouts, first → last | Self-reward F1 | Mean length | test: accuracy | "
        "test: majority | validation: accuracy | validation: majority |"
    )
    # tenths of 40 values are 4: steps 1 to 4 and 37 to 40; of the 27 that are there two, 1 and 2, and 38 and 40
    first, last = np.mean([0.11, 0.12, 0.13, 0.14]), np.mean([0.47, 0.48, 0.49, 0.5])
    f1 = np.mean([0.74, 0.76, 0.78, 0.8])
    assert rows[0] == (
        f"| mixed | algebra | {first:.3f} → {last:.3f} | {f1:.3f} | 100.0 | 0.625 | – | 0.375 | – |"
    )
    ends = f"{np.mean([0.21, 0.22]):.3f} → {np.mean([0.58, 0.6]):.3f}"
    assert rows[1] == rf"| mixed | geo\|metry | {ends} | 0.780 | 200.0 | – | 0.312 | – | 0.188 |"
    assert len(rows) == 2


def test_table_and_figure_of_sources_are_there_with_several_and_else_are_not(two, tmp_path):
    text = write_report(two, tmp_path / "both").read_text()
    assert "## Sources of the data\n" in text and "](plots/sources.png)" in text
    assert (tmp_path / "both" / "plots" / "sources.png").read_bytes().startswith(b"\x89PNG")
    text = write_report(two[1:], tmp_path / "both").read_text()  # over the other's figures
    assert "ources" not in text and not (tmp_path / "both" / "plots" / "sources.png").exists()


@pytest.mark.parametrize(
    ("laser", "kind", "starts"),
    [
        ({"enabled": True}, "LaSeR", (201, 401)),
        ({"enabled": True, "alpha": 0}, "GRPO", (None, 401)),
        ({"enabled": False}, "GRPO", (None, None)),
        ({"reasoning_warmup_steps": 5, "self_reward_warmup_steps": 6, "tau": 0}, "LaSeR", (6, None)),
        (
            {"alpha": 0, "readouts": [{"weight": 0.2, "warmup_steps": 3, "advantages_warmup_steps": 4}]},
            "LaSeR",
            (4, 8),
        ),
        (
            {"reasoning_warmup_steps": 9, "readouts": [{"weight": 0, "tau": 0.0}, {"warmup_steps": 2}]},
            "LaSeR",
            (3, None),
        ),
        ({"readouts": [{"weight": 0}, {"weight": 0, "advantages": "discrepancy"}]}, "GRPO", (None, 401)),
    ],
)
def test_what_a_run_trains_and_from_when_is_what_its_readouts_say(tmp_path, laser, kind, starts):
    (run,) = load_runs([write_run(tmp_path / "run", (), steps=2, laser=laser)])
    assert (run.kind, run.first_steps()) == (kind, starts)


METRICS = {
    "reward_mean": 0.5,
    "source/b/reward_mean": 0.25,
    "source/a/reward_mean": 0.75,
    "source/a/self_reward_f1": 0.625,
    "source/a/response_length_mean": 210.4,
    "source/b/epoch": 1.5,
    "eval/source/b/accuracy": 0.125,
}


def test_metrics_are_taken_apart_by_source_and_evaluations_last():
    found = metrics_by_source(METRICS)
    assert found == {
        "a": {"reward_mean": 0.75, "self_reward_f1": 0.625, "response_length_mean": 210.4},
        "b": {"reward_mean": 0.25, "epoch": 1.5, "eval/accuracy": 0.125},
    }
    later = later_metrics(found, {"b": {"reward_mean": 0.5}})
    assert later == {"a": found["a"], "b": {"reward_mean": 0.5, "eval/accuracy": 0.125}}
    assert later_metrics(later, {"b": {"eval/accuracy": 1.0}})["b"] == {
        "reward_mean": 0.5,
        "eval/accuracy": 1.0,
    }
    # a step without a response of it says where it stands in its data, and no more
    assert later_metrics(later, {"b": {"epoch": 1.75}})["b"] == later["b"] | {"epoch": 1.75}
    assert metrics_by_source({"reward_mean": 1.0, "eval/accuracy": 0.5}) == {}


def shown(metrics: dict, width: int = 120) -> list[str]:
    """The lines of the live view's last picture."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    with LiveView(2, "on", console=console) as view:
        view.update(1, metrics)
    return text.getvalue().splitlines()


def test_the_live_view_has_a_line_for_each_source():
    lines = shown(METRICS)
    (first,) = (i for i, line in enumerate(lines) if "sources" in line)
    assert "a  reward 0.750  F1 0.625  len 210" in lines[first]
    assert "b  reward 0.250  eval 0.125" in lines[first + 1]
    assert not any("sources" in line for line in shown({"reward_mean": 0.5}))
    narrow = shown(METRICS, width=40)
    (first,) = (i for i, line in enumerate(narrow) if "sources" in line)
    assert "a  reward" in narrow[first] and "…" in narrow[first] and "b  reward" in narrow[first + 1]


def test_of_many_sources_the_live_view_says_how_many_it_leaves_out():
    lines = shown({f"source/{i:02}/reward_mean": 0.5 for i in range(11)})
    assert sum("reward 0.500" in line for line in lines) == 8
    assert any("and 3 more" in line for line in lines)


def test_a_plain_line_has_the_reward_of_a_few_sources():
    assert "| reward of a 0.750, b 0.250" in plain_line(1, 2, METRICS)
    assert "reward of" not in plain_line(1, 2, {"reward_mean": 0.5})
    assert "reward of" not in plain_line(1, 2, {f"source/{i}/reward_mean": 0.5 for i in range(5)})

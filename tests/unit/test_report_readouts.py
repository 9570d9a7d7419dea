"""The report of runs with several readouts: a table and a figure, and nothing of them for runs with one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_laser.observability.metrics_logger import MetricsLogger
from megatron_laser.report.plots.readouts import plot_readouts
from megatron_laser.report.readout_table import readout_table
from megatron_laser.report.run_data import load_runs
from megatron_laser.report.run_report import write_report

PAINTED = True  # see helpers/pictures.py
STEPS = 60


def run(folder: Path, readouts: dict[str, float], *, quarters: bool = True) -> Path:
    """readouts: name -> AUROC in the last tenth of the steps, from 0.5 on; `score` is the response's."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": folder.name}, "laser": {}}))
    rng = np.random.default_rng(3)
    with MetricsLogger(folder, tensorboard=False) as log:
        for step in range(1, STEPS + 1):
            share = min(1.0, (step - 1) / (STEPS - 7))
            metrics: dict[str, float] = {"reward_mean": 0.5, "self_reward_f1": 0.4, "self_reward_loss": 0.2}
            for name, auroc in readouts.items():
                value = 0.5 + share * (auroc - 0.5) + (rng.normal(0, 0.02) if 0 < share < 1 else 0.0)
                if name == "score":
                    metrics["self_reward_auroc"] = value
                    continue
                own = {"auroc": value, "loss": 0.25 - 0.1 * share, "points": 96.0, "ece": 0.125, "f1": 0.5}
                if quarters and name.startswith("prefix"):
                    own |= {f"auroc_quarter_{q}": value - 0.04 * (4 - q) for q in (2, 3, 4)}
                metrics |= {f"readout/{name}/{key}": number for key, number in own.items()}
            log.log(step, metrics)
    return folder


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]


def test_each_readout_has_a_row_with_its_own_numbers_beside_the_response_s_score(tmp_path: Path) -> None:
    folder = run(tmp_path / "both", {"score": 0.9, "pair": 0.8, "prefix/128": 0.7})
    report = write_report([folder])
    head, _, *lines = cells(report.read_text().split("## Readouts\n")[1].split("\n## ")[0])
    assert [line[1] for line in lines] == ["the response's score", "pair", "prefix/128"]
    of = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    assert "Brier" not in head  # nobody has it
    assert of["the response's score"]["AUROC, first → last"].endswith("→ 0.900")
    assert of["the response's score"]["ECE"] == "–" and of["pair"]["ECE"] == "0.125"
    assert of["pair"]["AUROC, first → last"].endswith("→ 0.800")
    assert of["pair"]["Loss, first → last"].endswith("→ 0.1500")
    assert of["pair"]["AUROC by quarter of the response"] == "–"
    along = of["prefix/128"]["AUROC by quarter of the response"]
    assert along == "–, 0.620, 0.660, 0.700"  # no place in the first quarter
    figure = tmp_path / "both" / "plots" / "readouts.png"
    assert (
        figure.read_bytes()[:4] == b"\x89PNG"
        and "![Readouts over steps](plots/readouts.png)" in report.read_text()
    )


def test_a_run_with_one_readout_has_neither_table_nor_figure(tmp_path: Path) -> None:
    runs = load_runs([run(tmp_path / "one", {"score": 0.9})])
    assert readout_table(runs) == ""
    assert plot_readouts(runs, tmp_path / "readouts.png") is None and not (tmp_path / "readouts.png").exists()


@pytest.mark.parametrize("quarters", [True, False])
def test_runs_with_other_readouts_share_one_table(tmp_path: Path, quarters: bool) -> None:
    runs = load_runs(
        [
            run(tmp_path / "a", {"score": 0.9, "pair": 0.8}),
            run(tmp_path / "b", {"score": 0.9, "prefix": 0.7}, quarters=quarters),
            run(tmp_path / "c", {"score": 0.9}),
        ]
    )
    head, _, *lines = cells(readout_table(runs))
    assert [line[:2] for line in lines if line[1] != "the response's score"] == [
        ["a", "pair"],
        ["b", "prefix"],
    ]
    assert ("AUROC by quarter of the response" in head) is quarters
    plot_readouts(runs, tmp_path / "readouts.png")
    width, height = struct.unpack(">II", (tmp_path / "readouts.png").read_bytes()[16:24])
    assert width / height == pytest.approx((4.6 * (3 if quarters else 2) + 0.6) / (1.2 + 3.6 * 2), rel=0.01)

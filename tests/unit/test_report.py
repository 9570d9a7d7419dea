"""The report from synthetic runs: table, sentences and figures."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_laser.evaluation import EvaluationRecord, summarize, write_records
from megatron_laser.files import plain
from megatron_laser.observability.metrics_logger import MetricsLogger
from megatron_laser.report.plots import drift, policy, training
from megatron_laser.report.run_data import load_runs
from megatron_laser.report.run_report import write_report

PAINTED = True  # see helpers/pictures.py
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FIGURES = {"accuracy", "self_reward", "scores", "calibration", "votes", "time"}


def synthetic_records(
    rng: np.random.Generator, *, accuracy: float, gap: float, logprob_gap: float, problems: int, samples: int
) -> list[EvaluationRecord]:
    """Right responses score `gap` above wrong ones, and are `logprob_gap` more probable."""
    records: list[EvaluationRecord] = []
    for row in range(problems):
        chance = np.clip(rng.normal(accuracy, 0.25), 0.02, 0.98)
        for sample in range(samples):
            right = bool(rng.random() < chance)
            scored = bool(rng.random() < 0.95)
            score = (
                float(rng.normal(0.5 * (1 - gap) + gap * right, 0.25)) if gap else float(rng.normal(0, 0.02))
            )
            records.append(
                EvaluationRecord(
                    row=row,
                    sample=sample,
                    problem=f"problem {row}",
                    answer="1",
                    response="text",
                    response_ids_length=int(rng.integers(40, 90) + 8 * (not right)),
                    finish_reason="stop" if scored else "length",
                    scored=scored,
                    reward=float(right),
                    outcome="correct" if right else "wrong",
                    extracted="1" if right else "2",
                    zc_logprob=10 * score - 23 if scored else None,
                    score=score if scored else None,
                    mean_logprob=float(rng.normal(-0.5 + logprob_gap * right, 0.2)),
                    answer_class=0 if right else 1 + int(rng.integers(2)),
                )
            )
    return records


def synthetic_run(
    folder: Path, *, laser: bool, steps: int = 200, logprob_gap: float = 0.6, evaluations: bool = True
) -> Path:
    rng = np.random.default_rng(7 if laser else 8)
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name},
        "laser": {
            "enabled": laser,
            "alpha": 0.1,
            "reasoning_warmup_steps": 40,
            "self_reward_warmup_steps": 40,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsLogger(folder, tensorboard=False) as metrics:
        for step in range(1, steps + 1):
            metrics.log(step, synthetic_step(rng, step / steps, laser))
    if evaluations:
        for split, step, samples in (
            ("validation", 0, 1),
            ("validation", steps, 1),
            ("test", 0, 8),
            ("test", steps, 8),
        ):
            share = step / steps
            records = synthetic_records(
                rng,
                accuracy=0.35 + 0.4 * share,
                gap=0.5 * share * laser,
                logprob_gap=logprob_gap,
                problems=60,
                samples=samples,
            )
            path = folder / "evaluation" / f"{split}_step_{step}.jsonl"
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                write_records(file, records)
            summary = summarize(records, num_resamples=200, subsets=20)
            path.with_suffix(".json").write_text(json.dumps({name: plain(v) for name, v in summary.items()}))
    return folder


def synthetic_step(rng: np.random.Generator, share: float, laser: bool) -> dict[str, object]:
    learned = max(0.0, share - 0.2) if laser else 0.0
    spread = np.array([-0.35, -0.12, 0.0, 0.12, 0.35]) * (1 if laser else 0.1)
    return {
        "reward_mean": 0.35 + 0.4 * share + rng.normal(0, 0.04),
        "self_reward_f1": 0.9 * learned + rng.uniform(0, 0.08),
        "self_reward_auroc": 0.5 + 0.4 * learned + rng.normal(0, 0.03),
        "score_quantiles_right": (learned + spread + rng.normal(0, 0.02)).tolist(),
        "score_quantiles_wrong": (0.2 * learned + spread + rng.normal(0, 0.02)).tolist(),
        "time/generate": 0.2,
        "time/grade": 0.01,
        "time/logprob": 0.05,
        "time/train": 0.15 + 0.01 * laser,
        "time/sync": 0.01,
        "time/total": 0.45 + 0.01 * laser,
        "time/evaluate": 0.02,
        "time/tokens_per_second": 5000.0,
        "memory/peak_rss_gib": 1.2,
    }


def table_row(report: Path, label: str) -> list[str]:
    """The cells of the row that starts with `label`."""
    for line in report.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith(label):
            return cells[1:]
    raise AssertionError(f"no row {label!r} in {report}")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return (
        synthetic_run(folder / "laser", laser=True),
        synthetic_run(folder / "grpo", laser=False, steps=120),
    )


@pytest.fixture(scope="module")
def both(two_runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(two_runs, tmp_path_factory.mktemp("report"))


def test_every_figure_is_a_png_with_a_picture_in_it(both: Path) -> None:
    figures = {path.stem: path.read_bytes() for path in (both.parent / "plots").glob("*.png")}
    assert set(figures) == FIGURES
    assert all(data.startswith(PNG_SIGNATURE) and len(data) > 15_000 for data in figures.values())
    assert all(f"](plots/{name}.png)" in both.read_text() for name in FIGURES)


def test_table_has_the_numbers_of_the_last_test_evaluation(both: Path, two_runs: tuple[Path, Path]) -> None:
    laser = json.loads((two_runs[0] / "evaluation" / "test_step_200.json").read_text())
    grpo = json.loads((two_runs[1] / "evaluation" / "test_step_120.json").read_text())
    for label, name in (
        ("Self-reward F1", "self_reward_f1"),
        ("AUROC of the score", "self_reward_auroc"),
        ("AUROC of the mean token log-prob", "mean_logprob_auroc"),
        ("Weighted majority of 8", "weighted_majority"),
        ("Best of 8", "best_of"),
        ("Truncated", "truncated_fraction"),
    ):
        difference = f"{laser[name] - grpo[name]:+.3f}"
        assert table_row(both, label) == [f"{laser[name]:.3f}", f"{grpo[name]:.3f}", difference]
    before = json.loads((two_runs[0] / "evaluation" / "test_step_0.json").read_text())["accuracy"]
    expected = f"{before:.3f} (step 0) → {laser['accuracy']:.3f} (step 200)"
    assert table_row(both, "Accuracy on test, before")[0] == expected
    assert table_row(both, "Seconds per step") == ["0.46", "0.45", "+0.010"]
    assert table_row(both, "Time split")[0].startswith("generate 42%, grade 2%, logprob 10%, train 33%")


def test_report_says_when_the_mean_logprob_beats_the_score(both: Path) -> None:
    assert "**laser: the mean token log-prob (AUROC" in both.read_text()


def test_report_says_when_the_score_beats_the_mean_logprob(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", laser=True, logprob_gap=0.0)
    text = write_report([run]).read_text()
    assert "tells right from wrong better than the mean token log-prob" in text
    assert "**run: the mean token log-prob" not in text


def run_with(folder: Path, records: list[EvaluationRecord]) -> str:
    """The report of a run whose last evaluation has these records."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "run"}, "laser": {}}))
    with MetricsLogger(folder, tensorboard=False) as metrics:
        metrics.log(1, {"reward_mean": 0.5})
    path = folder / "evaluation" / "test_step_1.jsonl"
    path.parent.mkdir()
    with path.open("w") as file:
        write_records(file, records)
    summary = {name: plain(value) for name, value in summarize(records, subsets=20).items()}
    path.with_suffix(".json").write_text(json.dumps(summary))
    return write_report([folder]).read_text()


def test_a_handful_of_responses_gives_numbers_but_no_verdict(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    records = synthetic_records(rng, accuracy=0.5, gap=-0.5, logprob_gap=0.6, problems=5, samples=4)
    text = run_with(tmp_path / "run", records)
    said = [line for line in text.splitlines() if line.startswith("- ")]
    assert any("too few problems (5) to say" in line for line in said)
    assert sum("too few responses to say which is better" in line for line in said) == 2
    assert not [line for line in said if "**" in line or "better than" in line or "beyond chance" in line]


def test_every_claim_in_bold_has_an_interval_that_excludes_zero(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    worse = run_with(
        tmp_path / "worse",
        synthetic_records(rng, accuracy=0.5, gap=-0.4, logprob_gap=0.6, problems=60, samples=8),
    )
    bold = [line for line in worse.splitlines() if line.startswith("- **")]
    assert len(bold) == 3  # against the log-prob, against the length, best-of against one response
    assert any("is worse than one response" in line for line in bold)
    for line in bold:
        low, high = re.findall(r"\[([+-][\d.]+), ([+-][\d.]+)\]", line)[0]
        assert float(low) * float(high) > 0
    same = run_with(
        tmp_path / "same",
        synthetic_records(rng, accuracy=0.5, gap=0.2, logprob_gap=0.15, problems=60, samples=2),
    )
    assert not [line for line in same.splitlines() if line.startswith("- **")]
    assert "no difference beyond chance" in same


def test_votes_are_not_available_where_right_responses_have_no_answer(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    records = synthetic_records(rng, accuracy=0.5, gap=0.5, logprob_gap=0.6, problems=30, samples=4)
    for record in records:
        record.extracted = record.answer_class = None
    text = run_with(tmp_path / "run", records)
    assert "run: votes are not available" in text
    assert "| Majority of 4 |" not in text and "Weighted majority" not in text
    right = np.mean([record.right for record in records])
    best = float(table_row(tmp_path / "run" / "report.md", "Best of 4")[0])
    assert best > right  # not 0: chosen among all responses


def test_length_is_reported_raw_and_read_in_its_direction(both: Path, two_runs: tuple[Path, Path]) -> None:
    raw = json.loads((two_runs[0] / "evaluation" / "test_step_200.json").read_text())["length_auroc"]
    assert raw < 0.5
    assert table_row(both, "AUROC of the length")[0] == f"{raw:.3f}"
    assert f"the length (AUROC {1 - raw:.3f}, shorter responses being right more often)" in both.read_text()


def test_report_says_that_runs_differ_in_length(both: Path) -> None:
    assert "The runs differ in length" in both.read_text()
    assert "laser 200 steps, grpo 120" in both.read_text()


def test_the_accuracy_of_a_run_that_drops_groups_is_that_of_all_it_tried(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        for step in range(1, 11):
            counts = {"prompts_tried": 16, "groups_dropped_right": 1, "groups_dropped_wrong": 11}
            metrics.log(step, {"reward_mean": 0.5, "accuracy_tried": step / 100} | counts)
    report = write_report([tmp_path])
    assert table_row(report, "Accuracy of rollouts") == ["0.010 → 0.100"]
    text = report.read_text()
    assert "right 1.0% of the time at first, 10.0% at the end. That is over all 160 prompts" in text
    assert "10 were dropped because all their responses were right and 110 because all were wrong" in text
    assert "in the batches that were trained on it was 50.0% at the end" in text


def test_a_report_says_how_many_responses_could_not_be_graded(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        for step in range(1, 5):
            metrics.log(step, {"reward_mean": 0.5, "grading_failed": 3 * (step > 2)})
    assert "6 responses in 2 of 4 steps could not be graded" in write_report([tmp_path]).read_text()


def test_one_run_without_evaluation_gives_a_report_without_the_figures_that_need_one(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", laser=True, steps=3, evaluations=False)
    report = write_report([run])
    assert report == run / "report.md"
    assert {path.stem for path in (run / "plots").glob("*.png")} == FIGURES - {"calibration", "votes"}
    assert "no finished evaluation" in report.read_text()
    assert "LaSeR − GRPO" not in report.read_text()


def test_a_run_whose_score_was_only_evaluated_is_in_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPO's score is measured in evaluations alone: points without a line."""
    figures = []
    monkeypatch.setattr(training, "save", lambda figure, path, *texts: figures.append(figure) or path)
    for name, metric in (("laser", "self_reward_f1"), ("grpo", "eval/self_reward_f1")):
        with MetricsLogger(tmp_path / name, tensorboard=False) as metrics:
            for step in range(1, 4):
                metrics.log(step, {"reward_mean": 0.5, metric: 0.1 * step})
    training.plot_self_reward(load_runs([tmp_path / "laser", tmp_path / "grpo"]), tmp_path / "plot.png")
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["laser", "grpo", "validation"]


def test_the_drift_of_the_score_is_drawn_where_it_was_measured(
    two_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step; towards targets 1 and -1 at beta 0.5, that is 2 nats above and below c_ref."""
    folder = tmp_path / "drifting"
    with MetricsLogger(folder, tensorboard=False) as metrics:
        for step in range(1, 5):
            found = {"logprob_mean": -9.0, "right": 0.4 * step, "wrong": -0.1, "reference_mean": 0.2}
            found = {f"drift/{name}": value for name, value in found.items()} if step % 2 == 0 else {}
            metrics.log(step, {"reward_mean": 0.5, **found})
    laser = {"beta": 0.1, "readouts": [{"beta": 0.5, "targets": [1.0, -1.0]}]}
    (folder / "config.yaml").write_text(yaml.safe_dump({"laser": laser}))
    assert "](plots/drift.png)" in write_report([folder]).read_text()
    drawn = []
    monkeypatch.setattr(drift, "save", lambda figure, path, *texts: drawn.append((figure, texts)) or path)
    drift.plot_drift(load_runs([two_runs[0], folder]), tmp_path / "plot.png")
    assert drift.plot_drift(load_runs([two_runs[0]]), tmp_path / "plot.png") is None
    ((figure, texts),) = drawn
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["right"] == [[2.0, 0.8], [4.0, 1.6]] and lines["wrong"] == [[2.0, -0.1], [4.0, -0.1]]
    assert lines["reference, own responses"] == [[2.0, 0.2], [4.0, 0.2]]
    assert [line.get_ydata()[0] for line in axes.get_lines()[3:]] == [2.0, -2.0]
    assert texts[0].endswith("drifting right +1.60, wrong -0.10")


def test_the_policy_has_a_panel_for_each_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(policy, "save", lambda figure, path, *texts: figures.append((figure, texts)) or path)
    with MetricsLogger(tmp_path / "one", tensorboard=False) as metrics:
        for step in range(1, 4):
            told = {f"pass_at_{k}": 0.1 * k for k in (1, 2, 4)} | {"entropy": 0.7 - 0.1 * step, "lr": 1e-6}
            metrics.log(step, told | {"grad_norm": 1.0 if step < 3 else 50.0, "approx_kl": 1e-3})
    with MetricsLogger(tmp_path / "two", tensorboard=False) as metrics:
        metrics.log(1, {"reward_mean": 0.5})
    runs = load_runs([tmp_path / "one", tmp_path / "two"])
    policy.plot_policy(runs[:1], tmp_path / "plot.png")
    ((figure, texts),) = figures
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert list(panels) == [
        "pass@k: one of k responses is right",
        "Entropy, nats a token",
        "KL of each update (k3), nats a token",
        "Gradient norm before clipping",
        "Learning rate",
    ]
    first, *_, gradients, _rate = panels.values()
    assert [line.get_label() for line in first.lines] == ["k = 1", "k = 2", "k = 4"]
    assert gradients.get_yscale() == "log" and texts[0] == "The policy: entropy 0.60 → 0.40"
    assert policy.plot_policy(runs[1:], tmp_path / "plot.png") is None


def test_a_run_that_measured_no_score_still_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    with MetricsLogger(folder, tensorboard=False) as metrics:
        for step in range(1, 4):
            metrics.log(step, {"reward_mean": 0.5, "self_reward_auroc": math.nan})
    report = write_report([folder])
    assert table_row(report, "Accuracy of rollouts") == ["0.500 → 0.500"]
    assert [path.stem for path in (folder / "plots").glob("*.png")] == ["accuracy"]


def test_scores_of_one_class_are_reported_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "hopeless"
    with MetricsLogger(folder, tensorboard=False) as metrics:
        metrics.log(1, {"reward_mean": 0.0, "score_quantiles_wrong": [-0.1, 0.0, 0.0, 0.0, 0.1]})
    records = synthetic_records(
        np.random.default_rng(1), accuracy=0.5, gap=0.5, logprob_gap=0.0, problems=4, samples=2
    )
    for record in records:
        record.reward, record.answer_class = 0.0, 1
    path = folder / "evaluation" / "test_step_1.jsonl"
    path.parent.mkdir()
    with path.open("w") as file:
        write_records(file, records)
    summary = {name: plain(value) for name, value in summarize(records).items()}
    path.with_suffix(".json").write_text(json.dumps(summary))
    text = write_report([folder]).read_text()
    assert "all scored responses are of one class: no F1 and no AUROC" in text
    assert {path.stem for path in (folder / "plots").glob("*.png")} == FIGURES - {"self_reward", "time"}


def test_a_laser_configuration_that_trains_no_score_counts_as_grpo(
    two_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(two_runs[1], tmp_path / "alpha_0")
    config = {"run": {"name": "alpha_0"}, "laser": {"enabled": True, "alpha": 0.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report = write_report([two_runs[0], folder], tmp_path / "both.md")
    assert report == tmp_path / "both.md"
    assert "| alpha_0 (GRPO) | LaSeR − GRPO |" in report.read_text()


def test_equal_problems_give_a_paired_interval(tmp_path: Path) -> None:
    runs = [synthetic_run(tmp_path / name, laser=name == "laser") for name in ("laser", "grpo")]
    text = write_report(runs).read_text()
    assert "over the same problems)" in text


def test_alarms_of_each_run_are_listed_and_a_silent_run_says_none(tmp_path: Path) -> None:
    silent = synthetic_run(tmp_path / "silent", laser=False, steps=60, evaluations=False)
    cut = synthetic_run(tmp_path / "cut", laser=False, steps=60, evaluations=False)
    with MetricsLogger(cut, tensorboard=False) as metrics:
        for step in range(61, 121):
            metrics.log(step, {"truncated_fraction": 0.9 if step <= 90 else 0.1})
    section = write_report([silent, cut]).read_text().split("## Alarms\n")[1].split("\n## ")[0]
    assert "**silent**: none." in section
    (line,) = [line for line in section.splitlines() if line.startswith("- ")]
    assert line.startswith("- `truncated`, steps 74 to 90: many responses are cut: ")
    assert "since step 61. " in line and "docs/troubleshooting.md#while-it-runs" in line
    config = yaml.safe_load((cut / "config.yaml").read_text()) | {"alarms": {"enabled": False}}
    (cut / "config.yaml").write_text(yaml.safe_dump(config))
    assert "**cut**: off (`alarms.enabled: false`)" in write_report([cut]).read_text()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the output_dir of a run"):
        write_report([tmp_path])

"""Whole runs that keep their best checkpoint, end early and export on the way; crashes change nothing of it."""

import json
import os
import signal

import pytest
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import after_recording, run
from safetensors.torch import load_file

from megatron_laser.config import load_config
from megatron_laser.evaluation.model_folder import load_model_folder
from megatron_laser.run.output_checks import check_output_folder
from megatron_laser.trainer.checkpoint import folder as folders

METRIC = "eval/response_length_mean"
BEST = [f"checkpoint.best={{metric: {METRIC}, mode: min}}", "checkpoint.keep_last=1", "checkpoint.every=4"]
EXPORTS = ["checkpoint.export_every=2", "checkpoint.export_keep=2"]
STEPS = 6


class Crash(Exception):
    """Stands for a kill: nothing is saved."""


def crash():
    raise Crash


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keeping")
    return write_tiny_run(
        folder,
        data={"validation": "train.jsonl"},
        evaluation={"every": 1, "max_prompts": 4, "samples_per_prompt": 2, "baseline": True},
        optimizer={"lr": 3e-2},
        run={"steps": STEPS},
    )


@pytest.fixture(scope="module")
def undisturbed(file):
    """(output folder, {step: metric}) of a run that keeps its best."""
    out = run(file, file.parent / "whole", *BEST, "checkpoint.export_hf=true", *EXPORTS)
    return out, {row["step"]: row[METRIC] for row in metrics_without_times(out)}


def best_of(values):
    return min((value, step) for step, value in values.items() if step > 0)[1]


def kept(out):
    return [step for step, _ in folders.published(out / "checkpoints")]


def test_the_checkpoint_of_the_best_evaluation_is_kept_beside_the_newest_and_exported(undisturbed):
    out, values = undisturbed
    best = best_of(values)
    assert best not in (0, 4, STEPS), "the seed gives a best between two saves, or the test shows little"
    assert min(values, key=values.get) in (0, best)
    assert kept(out) == [best, STEPS]
    said = json.loads((out / "best.json").read_text())
    assert (said["step"], said["metric"], said["mode"], said["value"]) == (best, METRIC, "min", values[best])
    link = out / "checkpoints" / "best"
    assert link.resolve() == (out / "checkpoints" / f"step_{best:08d}").resolve()
    exported, final = (load_file(out / name / "model.safetensors") for name in ("hf_best", "hf"))
    assert exported.keys() == final.keys() and any((exported[k] != final[k]).any() for k in final)
    # its run is known wherever it is named
    for path in (out / "hf_best", link):
        model = load_model_folder(path)
        assert model.path == out / "hf_best" and model.ref_logprob == -5.0 and model.from_run


@pytest.mark.parametrize("after", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_run_that_is_killed_around_its_best_evaluation_keeps_the_same_best(
    file, undisturbed, tmp_path, monkeypatch, after
):
    expected, values = undisturbed
    step = best_of(values) + after
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        after_recording(patch, step, crash)
        run(file, out, *BEST)
    # the step after it: it was saved before that; in its own step: it was not
    assert (best_of(values) in kept(out)) is (after == 1)
    run(file, out, *BEST)
    assert kept(out) == kept(expected)
    ours, theirs = (json.loads((one / "best.json").read_text()) for one in (out, expected))
    ours.pop("checkpoint"), theirs.pop("checkpoint")
    assert ours == theirs
    assert metrics_without_times(out) == metrics_without_times(expected)


def test_a_run_that_is_stopped_in_its_last_step_ends_early_there(file, undisturbed, tmp_path, monkeypatch):
    _, values = undisturbed
    patience, best, since, end = 2, None, 0, None
    for step in range(1, STEPS + 1):
        since = 0 if best is None or values[step] > best + 0.1 else since + 1
        best = values[step] if not since else best
        if since == patience:
            end = step
            break
    assert end is not None and end < STEPS - 1, "the seed gives two evaluations in a row that are not better"
    early = [
        f"run.early_stop={{metric: {METRIC}, patience: {patience}, min_delta: 0.1}}",
        "checkpoint.export_every=1",
    ]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # the next start has nothing to do but to finish
        after_recording(patch, end, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, out, *early)
    assert not (out / "FINISHED").exists() and not (out / f"hf_step_{end}").exists()
    run(file, out, *early)
    assert (out / f"hf_step_{end}" / "config.json").is_file()  # made up for
    assert [row["step"] for row in metrics_without_times(out)] == list(range(end + 1))
    assert json.loads((out / "status.json").read_text())["step"] == end
    assert json.loads((out / "FINISHED").read_text())["step"] == end and (out / "report.md").is_file()
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (said,) = [event for event in events if event["kind"] == "finished"]
    assert said["step"] == end and said["text"].startswith(
        f"finished early after step {end}: {METRIC} has not"
    )
    before = (out / "metrics.jsonl").read_bytes()
    run(file, out, *early)  # nothing is left to do
    assert (out / "metrics.jsonl").read_bytes() == before
    settings = [f"run.output_dir={out}"]
    assert check_output_folder(load_config(file, [*settings, *early])).is_done(STEPS)
    longer = [one.replace("patience: 2", "patience: 3") for one in early]
    assert not check_output_folder(load_config(file, [*settings, *longer])).is_done(STEPS)


def test_exports_on_the_way_are_of_their_steps_and_the_newest_are_kept(undisturbed):
    out, _ = undisturbed
    assert sorted(path.name for path in out.glob("hf_step_*")) == ["hf_step_4", "hf_step_6"]
    events = [json.loads(line)["text"] for line in (out / "events.jsonl").read_text().splitlines()]
    exported = [text for text in events if text.startswith("exported")]
    assert exported == [f"exported hf_step_{n}" for n in (2, 4, 6)]
    last, before, final = (
        load_file(out / name / "model.safetensors") for name in ("hf_step_6", "hf_step_4", "hf")
    )
    assert all((last[name] == final[name]).all() for name in final)
    assert any((before[name] != final[name]).any() for name in final)


def test_epochs_are_made_into_steps_of_the_usable_problems(file, tmp_path, capsys):
    text = (
        file.read_text()
        .replace("  steps: 6\n", "  epochs: 0.5\n")
        .replace("max_prompt_tokens: 8", "max_prompt_tokens: 4")
    )
    yaml = file.parent / "epochs.yaml"
    yaml.write_text(text)
    config = load_config(yaml, [f"run.output_dir={tmp_path / 'out'}", "evaluation.every=0"])
    out = run(yaml, tmp_path / "out", "evaluation.every=0", "optimizer.schedule=cosine")
    rows = metrics_without_times(out)
    # 24 problems, half of them in steps of 4
    assert [row["step"] for row in rows if row["step"]] == [1, 2, 3] and rows[-1]["epoch"] == 0.5
    assert "run.epochs 0.5 at 4 problems a step: 3 steps" in capsys.readouterr().out
    assert not config.run.steps_known and load_config(out / "config.yaml").run.steps == 3
    # the schedule ends where they do
    assert rows[2]["lr"] < 0.5 * rows[0]["lr"]

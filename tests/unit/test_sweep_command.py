"""`megatron-laser sweep` with a stand-in for the train command: order, resuming, failures, signals, the table."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.source_tree import ROOT
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.cli.sweep import STOPPED, _asked, _run
from megatron_laser.cli.sweep_trials import listed, product
from megatron_laser.config import ConfigError

STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
given = dict(text.split("=", 1) for text in sys.argv[1:] if "=" in text)
lr, folder = float(given["optimizer.lr"]), pathlib.Path(given["run.output_dir"])
(folder / "evaluation").mkdir(parents=True, exist_ok=True)
with open({log!r}, "a") as file:
    print(folder.name, file=file, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
if lr == 3 and not os.path.exists({mended!r}):
    sys.exit(1)
if lr == 4 and not os.path.exists({mended!r}):
    time.sleep(60)
if "run.early_stop.metric" in given:  # ends early, after step 1 of 2
    early = {{"metric": given["run.early_stop.metric"], "mode": "max", "patience": 3, "min_delta": 0.0}}
    (folder / "FINISHED").write_text(json.dumps({{"step": 1, "steps": 2, "early_stop": early}}))
    sys.exit(0)
if "run.epochs" in given:
    (folder / "FINISHED").write_text(json.dumps({{"step": 1}}))
    sys.exit(0)
lines = [{{"step": 0, "eval/accuracy": 0.99}}, {{"step": 1, "eval/accuracy": 0.5 + lr / 10, "time/total": 1.0}},
         {{"step": 2, "eval/accuracy": 0.25, "time/total": 2.0}}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
for step in (0, 2):
    summary = {{"accuracy": step * lr / 10, "self_reward_f1": 0.5, "weighted_majority": 0.75}}
    (folder / "evaluation" / f"test_step_{{step}}.json").write_text(json.dumps(summary))
(folder / "FINISHED").write_text(json.dumps({{"step": 2}}))
"""


@pytest.fixture
def stage(tmp_path):
    """(the run's YAML file, the stand-in, its log)."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tmp_path}}}\ndata: {{train: t.jsonl}}\nlaser: {{enabled: false}}\n"
        "run: {steps: 2, output_dir: out}\n"
    )
    program, log = tmp_path / "program", tmp_path / "log"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(log), mended=str(tmp_path / "mended")))
    program.chmod(0o755)
    return file, program, log


def sweep(stage, *arguments):
    return CliRunner().invoke(app, ["sweep", str(stage[0]), "--launcher", str(stage[1]), *arguments])


def table(folder):
    with (folder / "sweep.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_runs_follow_each_other_a_failure_ends_none_and_the_same_command_goes_on(stage, tmp_path):
    arguments = ("--set", "optimizer.lr=3,1,2")
    result = sweep(stage, *arguments)
    assert result.exit_code == 1, result.output
    assert stage[2].read_text().split() == ["lr=3", "lr=1", "lr=2"]
    rows = table(tmp_path / "out_sweep")
    assert {label: row["state"] for label, row in rows.items()} == {
        **{"lr=3": "failed (exit status 1)", "lr=1": "finished", "lr=2": "finished"}
    }
    row = rows["lr=2"]  # the initial model's 0.99 is no best of the run
    assert float(row["validation_best"]) == pytest.approx(0.7) and row["validation_best_step"] == "1"
    assert (row["validation_last"], row["test_accuracy"], row["f1"]) == ("0.25", "0.4", "0.5")
    assert (row["weighted_majority"], row["seconds"], row["auroc"]) == ("0.75", "3.0", "")
    (tmp_path / "mended").touch()
    again = sweep(stage, *arguments)
    assert again.exit_code == 0, again.output
    assert "lr=1: finished before, skipped" in again.output
    assert stage[2].read_text().split() == ["lr=3", "lr=1", "lr=2", "lr=3"]
    assert "| lr=3 | finished |" in (tmp_path / "out_sweep" / "sweep.md").read_text()


def test_a_file_that_is_complete_only_with_each_run_s_settings_is_swept(stage, tmp_path):
    stage[0].write_text(stage[0].read_text().replace("steps: 2, ", ""))
    assert sweep(stage, "--set", "run.steps=2,3", "--print").output.count("/out_sweep/steps=") == 2


@pytest.mark.parametrize(
    "given",
    [
        ["data.validation=t.jsonl", "evaluation.every=1", "run.early_stop.metric=eval/accuracy"],
        ["run.epochs=1", "run.steps=null", "rollout.prompts_per_step=1"],
    ],
)
def test_a_run_that_ends_before_run_steps_does_not_stop_the_sweep(stage, tmp_path, given):
    (tmp_path / "t.jsonl").write_text('{"problem": "1", "answer": "1"}\n')
    arguments = [*given, f"data.train={tmp_path}/t.jsonl", "--set", "optimizer.lr=1,2"]
    result = sweep(stage, *arguments)
    assert result.exit_code == 0, result.output
    assert stage[2].read_text().split() == ["lr=1", "lr=2"]
    again = sweep(stage, *arguments)
    assert again.exit_code == 0 and again.output.count("finished before, skipped") == 2


def test_fail_fast_print_and_results(stage, tmp_path):
    printed = sweep(stage, "--set", "optimizer.lr=3,1", "--print", "run.seed=5")
    assert printed.exit_code == 0 and not stage[2].exists()
    assert [line.split()[5:8] for line in printed.output.splitlines()] == [
        ["run.seed=5", f"optimizer.lr={lr}", f"run.output_dir={tmp_path}/out_sweep/lr={lr}"] for lr in (3, 1)
    ]
    assert sweep(stage, "--set", "optimizer.lr=3,1", "--fail-fast").exit_code == 1
    assert stage[2].read_text().split() == ["lr=3"]
    results = sweep(stage, "--set", "optimizer.lr=3,1", "--results")
    assert results.exit_code == 0 and "not started" in results.output
    assert stage[2].read_text().split() == ["lr=3"]


def test_files_of_further_settings_are_for_every_run(stage, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("optimizer: {lr: 7.0, weight_decay: -1}\n")
    given = ["--set", "optimizer.lr=1,2", "--set-file", str(more), "--print"]
    result = sweep(stage, *given)
    assert result.exit_code == 2 and "more.yaml, line 1: optimizer.weight_decay" in result.output
    more.write_text("optimizer: {lr: 7.0, weight_decay: 0.5}\n")
    lines = sweep(stage, *given).output.splitlines()
    assert len(lines) == 2 and all(f"--set-file {more} optimizer.lr=" in line for line in lines)


def test_every_run_is_checked_before_the_first(stage, tmp_path):
    result = sweep(stage, "--set", "optimizer.lr=1,fast")
    assert result.exit_code == 2
    assert "optimizer.lr: expected a number, got 'fast'" in result.output
    assert not stage[2].exists() and not (tmp_path / "out_sweep").exists()
    assert "use --output" in sweep(stage, "--set", "run.output_dir=a,b").output
    assert "two runs have it" in sweep(stage, "--set", "optimizer.lr=1,1").output
    assert "are too many for the name of a folder" in sweep(stage, "--set", f"run.name={'a' * 201},b").output
    assert sweep(stage, "--set", "optimizer.lr=1", "--launcher", "'torchrun").exit_code == 2
    assert not stage[2].exists()


def test_a_signal_ends_the_run_and_then_the_sweep(stage, tmp_path):
    command = [sys.executable, "-m", "megatron_laser", "sweep", str(stage[0]), "--launcher", str(stage[1])]
    process = subprocess.Popen(
        [*command, "--set", "optimizer.lr=4,1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not stage[2].exists() or not stage[2].read_text():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)  # the stand-in's handler
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, output
    assert "the same command again goes on" in output
    assert stage[2].read_text().split() == ["lr=4"]
    assert table(tmp_path / "out_sweep")["lr=4"]["state"] == "stopped"


def test_a_request_between_two_runs_starts_none_and_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _asked() as asked:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # which the runs inherit
            os.kill(os.getpid(), signal.SIGINT)
            assert asked.yes and asked.late == signal.SIGINT
            assert _run(["/no/such/program"], asked) == STOPPED
    finally:
        signal.signal(signal.SIGHUP, before)


def test_products_and_lists(tmp_path):
    assert [label for label, _ in product(["optimizer.lr=1,2", "laser.tau=0"])] == [
        "lr=1_tau=0",
        "lr=2_tau=0",
    ]
    assert product(["optimizer.betas=[0.9, 0.95],[0.9, 0.99]"])[1][1] == ("optimizer.betas=[0.9, 0.99]",)
    with pytest.raises(ConfigError, match="given twice"):
        product(["a.b=1", "a.b=2"])
    file = tmp_path / "sweep.yaml"
    file.write_text("- {label: low, overrides: [optimizer.lr=1e-6]}\n- overrides: {laser.tau: 0.2}\n")
    assert listed(file) == [("low", ("optimizer.lr=1e-6",)), ("tau=0.2", ("laser.tau=0.2",))]
    file.write_text("- {label: low}\n- {overrides: 3}\n")
    with pytest.raises(ConfigError, match=r"line 1: expected \{label: NAME"):
        listed(file)

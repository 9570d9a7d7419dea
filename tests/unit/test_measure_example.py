"""The tables of tools/measure_example.py, from runs whose figures are known."""

import json
import sys
from dataclasses import replace

import pytest
from helpers.source_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import measure_example
from measure_example import EXAMPLES, evaluations, intervals, tables

from megatron_laser.evaluation.records import EvaluationRecord, write_records
from megatron_laser.evaluation.summary import summarize
from megatron_laser.files import plain

PROBLEMS = 20


def responses(right_of_four, score_right, score_wrong):
    """20 problems of four responses, `right_of_four` of them right; wrong answers agree with each other."""
    records = []
    for problem in range(PROBLEMS):
        for sample in range(4):
            right = sample < right_of_four
            records.append(
                EvaluationRecord(
                    row=problem, sample=sample, problem="q", answer="1", response="r", response_ids_length=5 + sample,
                    finish_reason="stop", scored=True, reward=float(right), outcome="correct" if right else "wrong",
                    extracted="1" if right else "2", zc_logprob=-10.0, score=score_right if right else score_wrong,
                    mean_logprob=-0.5 if right else -0.25, answer_class=int(right),
                )
            )  # fmt: skip
    return records


def write_run(folder, before, after):
    (folder / "evaluation").mkdir(parents=True)
    for step, records in ((0, before), (100, after)):
        path = folder / "evaluation" / f"test_step_{step}.json"
        path.write_text(json.dumps({name: plain(value) for name, value in summarize(records).items()}))
        with path.with_suffix(".jsonl").open("w") as file:
            write_records(file, records)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def runs(tmp_path):
    """The base has one right of four; GRPO two, with a score that is upside down; LaSeR two, with a good one."""
    base = responses(1, 0.0, 1.0)
    write_run(tmp_path / "grpo_7", base, responses(2, 0.0, 1.0))
    write_run(tmp_path / "laser_7", base, responses(2, 0.9, 0.1))
    return tmp_path


@pytest.mark.parametrize("example", sorted(EXAMPLES))
def test_what_was_asked_for_stands_beside_what_came_out(runs, example):
    lines = [cells(line) for line in tables(example, runs, [7]).splitlines()]
    found = {line[0]: line[1:] for line in lines if len(line) == 4}
    assert found["accuracy gain, GRPO"][0] == found["accuracy gain, LaSeR"][0] == "0.250"
    assert found["LaSeR's accuracy minus GRPO's"][::2] == ["0.000", "met"]
    assert found["LaSeR's F1"][::2] == ["1.000", "met"]
    assert found["LaSeR's AUROC minus that of GRPO's untrained score"][0] == "1.000"
    assert found["LaSeR's weighted vote minus its majority"][2] == "met"
    assert found["LaSeR's score against its mean log-prob, AUROC"][0] == "+1.000"


def test_a_target_that_is_missed_is_called_so(tmp_path):
    base = responses(2, 0.5, 0.5)
    for method in ("grpo", "laser"):
        write_run(tmp_path / f"{method}_1", base, base)
    text = tables("smollm2", tmp_path, [1])
    assert text.count("**missed**") == 7  # all but that LaSeR is not below GRPO
    assert text.count("| met |") == 1


def test_figures_have_intervals_over_problems(runs):
    figures = intervals(evaluations(runs / "laser_7")[1].records)
    assert figures["accuracy"] == (0.5, 0.5, 0.5)  # each problem has two right ones
    assert figures["AUROC of mean log-prob"] == (0.0, 0.0, 0.0)
    assert figures["majority of 4 weighted by the score"] == (1.0, 1.0, 1.0)
    assert figures["majority of 4 weighted by mean log-prob"] == (0.0, 0.0, 0.0)


def test_what_is_undefined_is_blank(tmp_path):
    """One class among the scored responses has no AUROC, responses without a box have no votes."""
    right = [replace(record, extracted=None, answer_class=None) for record in responses(4, 0.9, 0.1)]
    for method in ("grpo", "laser"):
        write_run(tmp_path / f"{method}_1", right, right)
    lines = [cells(line) for line in tables("smollm2", tmp_path, [1]).splitlines()]
    run = next(line for line in lines if line[0] == "laser, seed 1")
    assert run[1] == "1.000" and run[3] == "" and run[-1] == ""
    assert ["LaSeR's AUROC", "", ">= 0.80", "**missed**"] in lines


@pytest.mark.parametrize(
    "arguments",
    [["smollm2", "--seeds", "1", "--runs", "X", "run.steps=2"], ["smollm2", "run.steps=2", "--seeds", "1"]],
)
def test_settings_may_stand_behind_options(arguments, monkeypatch, tmp_path):
    """One method after the other, and none after one that failed."""
    commands = []

    def wait_for(running):
        assert len(running) == 1
        sys.exit("failed")

    monkeypatch.setattr(measure_example, "ROOT", tmp_path)
    monkeypatch.setattr(measure_example, "wait_for", wait_for)
    monkeypatch.setattr(measure_example.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(measure_example.subprocess, "Popen", lambda command, **_: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["measure_example.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="failed"):
        measure_example.main()
    (command,) = commands
    assert command[-1] == "run.steps=2" and "run.seed=1" in command


def test_a_run_without_its_evaluations_is_named(tmp_path):
    with pytest.raises(SystemExit, match="has no evaluation before and after training"):
        evaluations(tmp_path / "laser_1")

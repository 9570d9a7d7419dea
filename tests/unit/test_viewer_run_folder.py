"""Reading a run's folder while it grows, is cut back, or is of an older version."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_run import metrics_line, write_synthetic_run

from megatron_laser.viewer.growing_file import GrowingFile
from megatron_laser.viewer.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_synthetic_run(tmp_path / "run", steps=60, responses=0, total_steps=100, finished=False)


def append_step(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(metrics_line(step, np.random.default_rng(step)))


def test_only_new_lines_are_read_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    growing = GrowingFile(path)
    assert growing.new_lines() == (False, [])
    path.write_text('{"a": 1}\nbroken\n[2]\n{"a": 3}\n{"a"')
    anew, lines = growing.new_lines()
    assert (anew, [line.record for line in lines]) == (False, [{"a": 1}, {"a": 3}])
    assert path.read_bytes()[lines[1].offset :][: lines[1].length] == b'{"a": 3}\n'
    with path.open("a") as file:
        file.write(": 4}\n")
    assert [line.record for line in growing.new_lines()[1]] == [{"a": 4}]
    assert growing.new_lines() == (False, [])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_was_cut_and_written_on_is_read_anew(tmp_path: Path, in_place: bool) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    growing = GrowingFile(path)
    growing.new_lines()
    changed = '{"a": 1}\n{"a": 7}\n{"a": 8}\n'  # longer than before: its size alone tells nothing
    if in_place:
        path.write_text(changed)
    else:
        (tmp_path / "new").write_text(changed)
        os.replace(tmp_path / "new", path)
    anew, lines = growing.new_lines()
    assert anew and [line.record["a"] for line in lines] == [1, 7, 8]


def test_reading_ends_before_long_values_but_not_at_their_name_in_a_text(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    texts = ['say ", "tokens": [1]', "é", 'ends in ",']
    path.write_text(
        "".join(json.dumps({"text": text, "tokens": [1, 2]}, ensure_ascii=False) + "\n" for text in texts)
    )
    _, lines = GrowingFile(path, up_to="tokens").new_lines()
    assert [(line.record, line.cut) for line in lines] == [({"text": text}, True) for text in texts]


def test_curves_have_a_value_for_each_step_and_null_where_there_is_none(folder: Path) -> None:
    run = RunFolder(folder)
    assert (run.name, run.last_step, run.total_steps) == ("synthetic", 60, 100)
    curves = run.curves(["reward_mean", "eval/accuracy", "unknown"])
    assert curves["steps"] == list(range(1, 61)) and list(curves["values"]) == [
        "reward_mean",
        "eval/accuracy",
    ]
    given = [
        step for step, value in zip(curves["steps"], curves["values"]["eval/accuracy"]) if value is not None
    ]
    assert given == [50]
    assert "score_quantiles_right" not in run.metric_names and "eval/nothing" not in run.metric_names
    assert run.settings()["laser.beta"] == 0.1
    assert run.checkpoints == [30, 60]


def test_new_steps_appear_and_raise_the_version_and_nothing_else_does(folder: Path) -> None:
    run = RunFolder(folder)
    version = run.version
    run.refresh()
    assert run.version == version
    append_step(folder, 61)
    run.refresh()
    assert run.version > version and run.last_step == 61


def test_a_resumed_run_loses_its_later_steps(folder: Path) -> None:
    run = RunFolder(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "new").write_text("".join(lines[:40]))
    os.replace(folder / "new", folder / "metrics.jsonl")
    run.refresh()
    assert run.last_step == 40


def test_steps_have_their_spans_and_events_are_in_order(folder: Path) -> None:
    run = RunFolder(folder)
    assert run.timeline_steps == list(range(1, 61))
    spans = run.spans_of(7)
    assert {key: spans[2][key] for key in ("who", "phase")} == {"who": "rank 0", "phase": "generate"}
    assert run.spans_of(1000) == []
    assert {event["kind"] for event in run.events} >= {"checkpoint", "server", "resume", "stop", "skipped"}


def test_a_run_of_an_older_version_has_no_timeline_and_no_events(tmp_path: Path) -> None:
    run = RunFolder(write_synthetic_run(tmp_path, steps=5, responses=0, old_format=True))
    assert (run.last_step, run.timeline_steps, run.events, run.spans_of(3)) == (5, [], [], [])


def test_the_state_is_what_the_folder_says_of_its_process(folder: Path) -> None:
    def state() -> str:
        return RunFolder(folder).state

    assert state() == "unknown"
    (folder / "STOPPED").write_text('{"step": 60}')
    assert state() == "stopped"
    (folder / "run.lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert state() == "running"
    (folder / "FINISHED").write_text('{"step": 60}')
    assert state() == "finished"


def test_a_configuration_that_cannot_be_read_leaves_the_rest(folder: Path) -> None:
    (folder / "config.yaml").write_text("a: [")
    run = RunFolder(folder)
    assert (run.settings(), run.last_step, run.name) == ({}, 60, "run")

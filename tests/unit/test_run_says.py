"""A whole run on one process says what it is about, what it goes on from, and how it has ended."""

import json
import os
import signal

import pytest
from helpers.tiny_run import write_tiny_run
from helpers.whole_runs import after_recording, before_recording, run

from megatron_laser.report.what_happened import read_events
from megatron_laser.run.observed import observe


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("run"), run={"steps": 3}, checkpoint={"every": 1})


def labelled(printed, label):
    return [line[11:] for line in printed.splitlines() if line[:11] == f"{label:<11}"]


def test_a_run_that_is_stopped_and_continued_says_so_in_its_first_and_last_lines(
    file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        after_recording(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, out)
    printed = capsys.readouterr().out
    assert labelled(printed, "start") == ["at step 1, from the weights of model.path"]
    assert labelled(printed, "data") == [f"train: 24 problems of {file.parent}/train.jsonl"]
    (saved,) = [line for line in printed.splitlines() if line.startswith("step 1: saved ")]
    assert saved.startswith(f"step 1: saved {out}/checkpoints/step_00000001: ") and saved.endswith(" s")
    assert labelled(printed, "ended")[0].startswith("stopped (SIGTERM): 1 of 3 steps; ")
    assert labelled(printed, "wrong")[0].startswith("nothing: ")
    # What a killed run may leave: a save that was not published, steps that were not saved.
    (out / "checkpoints" / "step_00000002.partial").mkdir()
    with (out / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2}\n')
    (file.parent / "lucky.py").write_text((file.parent / "lucky.py").read_text() + "\n# edited\n")
    run(file, out, "reward.deadline=9.0")
    printed = capsys.readouterr().out
    again = "step 2 was done before and is done again"
    assert labelled(printed, "resumes") == [
        f"at step 2, from the checkpoint {out}/checkpoints/step_00000001; {again}"
    ]
    assert labelled(printed, "not used")[0].startswith("step_00000002.partial: ")
    assert labelled(printed, "before")[0].endswith("stopped after step 1: SIGTERM")
    assert labelled(printed, "changed")[0].startswith("reward.deadline: ")
    assert labelled(printed, "edited")[0].startswith(str(file.parent / "lucky.py"))
    assert labelled(printed, "ended")[0].startswith("finished: 3 of 3 steps, 2 of them by this start; ")
    kinds = [event["kind"] for event in read_events(out) if event["kind"] in ("start", "stop", "end")]
    assert kinds == ["start", "stop", "start", "end"]
    facts = [event["facts"] for event in read_events(out) if event["kind"] == "start"]
    assert facts[0]["resumed"] is None and facts[1]["resumed"]["step"] == 1
    assert "## Nothing went wrong" in (out / "report.md").read_text()
    seen = observe(out)
    assert (seen.state, seen.step, seen.steps, seen.checkpoint) == ("finished", 3, 3, 3)


def test_a_run_that_fails_says_what_it_had_and_the_report_has_it_too(file, tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("a fault\nof two lines")

    before_recording(monkeypatch, 2, broken)
    with pytest.raises(RuntimeError, match="a fault"):
        run(file, tmp_path / "out", "checkpoint.every=0")
    printed = capsys.readouterr().out
    assert labelled(printed, "ended")[0].startswith("failed (RuntimeError: a fault): 1 of 3 steps; ")
    assert labelled(printed, "saved") == ["no checkpoint"]
    last = json.loads((tmp_path / "out" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["text"]) == ("end", "failed (RuntimeError: a fault) after step 1")

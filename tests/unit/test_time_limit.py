"""`run.time_limit`: written as schedulers write it; a run ends, saved, before its time does."""

import pytest
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import run
from pydantic import TypeAdapter, ValidationError

from megatron_laser.config.schema.fields import Duration
from megatron_laser.run import time_limit
from megatron_laser.run.status import read_status
from megatron_laser.run.time_limit import TimeLimit
from megatron_laser.trainer.checkpoint import folder as folders


@pytest.mark.parametrize(
    "written, seconds",
    [
        *((600, 600.0), (0.5, 0.5), ("90", 90.0), ("1e3", 1000.0)),
        *(("3:55:00", 14100.0), ("03:55:00", 14100.0), ("1-00:00:00", 86400.0), ("36:00:00", 129600.0)),
        *(("3h55m", 14100.0), ("3h 55m", 14100.0), ("2d", 172800.0), ("90m", 5400.0), ("1h1s", 3601.0)),
    ],
)
def test_a_duration_is_seconds_or_what_people_and_schedulers_write(written, seconds):
    assert TypeAdapter(Duration).validate_python(written) == seconds


@pytest.mark.parametrize(
    "written", ["3:55", "3:5:0", "3:75:00", "55m3h", "soon", "", "0", 0, -1, True, "1 week", []]
)
def test_what_could_be_read_two_ways_or_none_is_refused(written):
    with pytest.raises(ValidationError):
        TypeAdapter(Duration, config={"strict": True}).validate_python(written)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def limit(seconds=100.0):
    clock = Clock()
    found = TimeLimit(seconds, clock.now, clock)

    def spend(phase, seconds):
        found.enter(phase)
        clock.now += seconds

    return found, clock, spend


def test_the_next_step_fits_by_the_longest_step_evaluation_and_save_that_were_seen():
    found, clock, spend = limit()
    spend("building the model", 10.0)
    spend("first evaluation", 4.0)
    found.step_done("first evaluation", steps=0)
    for seconds in (8.0, 3.0):
        spend("rollout of step 1", seconds)
        spend("evaluation after step 1", 6.0)
        spend("train step 1", 1.0)
        found.step_done("recording", steps=1)
        spend("saving step 1", 2.0)
    # gone: 10 + 4 + 15 + 2 + 10 + 2 = 43. A step of 9, a save of 2: 12.1, and 5 for the end; an evaluation: 6.6 more.
    assert clock.now == 1043.0 and found.save_seconds == 2.0
    clock.now = 1100.0 - 5.0 - 12.1 - 0.01
    assert found.has_room(evaluation=False) and not found.has_room(evaluation=True)
    clock.now += 0.02
    assert not found.has_room(evaluation=False)
    assert found.latest_stop == pytest.approx(1100.0 - 5.0 - 2.2)


def test_a_save_that_was_not_seen_is_as_long_as_a_step_and_one_in_the_background_is_told_of():
    found, _, spend = limit()
    found.step_done("", steps=0)
    spend("rollout of step 1", 7.0)
    found.step_done("", steps=1)
    assert found.save_seconds == 7.0
    found.saved(3.0)
    assert found.save_seconds == 3.0


def test_only_recent_steps_count():
    found, _, spend = limit(1e6)
    found.step_done("", steps=0)
    for seconds in (500.0, *[1.0] * 10):
        spend("rollout of step 1", seconds)
        found.step_done("", steps=1)
    assert found.save_seconds == 1.0


@pytest.mark.slow
def test_a_run_saves_and_stops_in_time_and_continues_bitwise(tmp_path, monkeypatch):
    file = write_tiny_run(tmp_path, run={"steps": 3}, checkpoint={"every": 10})
    whole = run(file, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(time_limit, "_CLOSING", 3600.0 - 0.05)  # an hour is over after the first step
        run(file, out, "run.time_limit=1h")
    status = read_status(out)
    assert (status.state, status.exit_status, status.reason) == ("stopped", 3, "run.time_limit 3600 s")
    assert status.step < 3
    run(file, out, "run.time_limit=1h")
    assert read_status(out).state == "finished"
    assert metrics_without_times(out) == metrics_without_times(whole)
    assert [step for step, _ in folders.published(out / "checkpoints")][-1] == 3

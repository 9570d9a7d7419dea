"""Seconds per phase."""

from __future__ import annotations

import threading

import pytest

from megatron_laser.observability.timers import Timers


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_phase_accumulates_until_it_is_collected(clock: Clock) -> None:
    timers = Timers(clock)
    for seconds in (1.0, 2.0):
        with timers("train"):
            clock.now += seconds
    assert timers.collect() == {"time/train": 3.0}
    assert timers.collect() == {}


def test_nested_phases_each_get_their_full_time(clock: Clock) -> None:
    timers = Timers(clock)
    with timers("total"):
        clock.now += 1
        with timers("generate"):
            clock.now += 2
    assert timers.collect() == {"time/generate": 2.0, "time/total": 3.0}


def test_a_phase_within_itself_is_counted_once(clock: Clock) -> None:
    timers = Timers(clock)
    with timers("train"):
        clock.now += 1
        with timers("train"):
            clock.now += 2
        clock.now += 4
    assert timers.collect() == {"time/train": 7.0}


def test_collecting_inside_a_phase_splits_its_time(clock: Clock) -> None:
    timers = Timers(clock)
    with timers("total"):
        clock.now += 1
        assert timers.collect() == {"time/total": 1.0}
        clock.now += 2
    assert timers.collect() == {"time/total": 2.0}


def test_the_current_phase_is_the_innermost_even_after_an_error(clock: Clock) -> None:
    timers = Timers(clock)
    assert timers.current == ""
    with timers("total"):
        with pytest.raises(ValueError), timers("train"):
            assert timers.current == "train"
            raise ValueError
        assert timers.current == "total"
    assert timers.current == ""


def test_phases_of_two_threads_may_overlap() -> None:
    timers = Timers()
    inside, leave = threading.Event(), threading.Event()

    def grade() -> None:
        with timers("grade"):
            inside.set()
            leave.wait(timeout=5)

    thread = threading.Thread(target=grade)
    thread.start()
    assert inside.wait(timeout=5)
    with timers("generate"):
        leave.set()
        thread.join(timeout=5)
    seconds = timers.collect()
    assert set(seconds) == {"time/grade", "time/generate"}
    assert timers.current == ""

"""What may be asked of a live run through its output folder."""

import json
import threading
import time

import pytest
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.observability import control
from megatron_laser.observability.control import Watcher, ask_for_stacks, ask_for_window, known_ranks


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(control, "LOOK_SECONDS", 0.02)


@pytest.fixture
def watch(tmp_path):
    """Starts watchers of ranks in `tmp_path`."""
    started = []

    def start(rank=0, world_size=1, **settings):
        started.append(
            Watcher(tmp_path, rank, world_size, phase=lambda: f"train step 7 of {rank}", **settings)
        )
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_every_rank_writes_the_stacks_of_all_its_threads_and_its_phase(tmp_path, watch):
    held = threading.Event()

    def a_thread_that_hangs():
        held.wait(30)

    hanging = threading.Thread(target=a_thread_that_hangs, name="hangs")
    hanging.start()
    try:
        watch(0, 2)
        watch(1, 2)
        found = ask_for_stacks(tmp_path, deadline=20)
    finally:
        held.set()
        hanging.join()
    assert found.phases == {0: "train step 7 of 0", 1: "train step 7 of 1"} and found.silent == []
    text = (found.folder / "rank_1.txt").read_text()
    assert text.startswith("rank 1 of 2, process ") and "\nphase: train step 7 of 1\n" in text
    # The main thread is first, and it waits here for the answer.
    main, others = text.index("thread MainThread"), text.index("thread hangs")
    assert main < text.index("ask_for_stacks") < others < text.index("a_thread_that_hangs")


def test_a_rank_that_does_not_answer_is_named_after_the_deadline(tmp_path, watch):
    watch(0, 2)
    silent = {"rank": 1, "world_size": 2, "host": "node7", "pid": 4242}
    (tmp_path / "control" / "rank_1.json").write_text(json.dumps(silent))
    started = time.monotonic()
    done = CliRunner().invoke(app, ["stacks", str(tmp_path), "--deadline", "1"])
    assert 1 <= time.monotonic() - started < 10
    assert done.exit_code == 1
    assert "rank 0: train step 7 of 0" in done.output
    assert (
        "rank 1: no answer within 1 s (process 4242 on node7)" in done.output
        and "kill -QUIT 4242" in done.output
    )
    assert "stacks of 1 of 2 ranks" in done.output
    assert not (tmp_path / "control" / "requests").exists()  # whoever starts later has nothing to answer


def test_a_window_is_asked_of_rank_0_which_says_that_it_has_heard(tmp_path, watch):
    asked = []
    watch(1, 2)
    watch(0, 2, on_profile=asked.append)
    done = CliRunner().invoke(app, ["profile", str(tmp_path), "--steps", "3", "--deadline", "20"])
    assert done.exit_code == 0, done.output
    assert asked == [3] and "a window of 3 steps begins with the next step" in done.output


def test_a_window_that_nobody_hears_of_is_not_left_for_the_next_start(tmp_path, watch):
    watch(0, 1)  # not rank 0's business here
    assert not ask_for_window(tmp_path, 1, deadline=0.2)
    assert not (tmp_path / "control" / "requests").exists()


def test_requests_of_an_earlier_attempt_are_not_answered(tmp_path, watch):
    requests = tmp_path / "control" / "requests"
    requests.mkdir(parents=True)
    (requests / "profile-old.json").write_text('{"steps": 9}')
    asked = []
    watch(0, 1, on_profile=asked.append)
    assert ask_for_window(tmp_path, 2, deadline=20)
    assert asked == [2]


def test_requests_that_cannot_be_read_are_one_warning_and_later_ones_are_answered(tmp_path, watch, caplog):
    asked = []
    watch(0, 1, on_profile=asked.append)
    requests = tmp_path / "control" / "requests"
    requests.mkdir(parents=True)
    for name in ("a", "b"):
        (requests / f"profile-{name}.json").write_text("no JSON")
        time.sleep(0.2)
    assert ask_for_window(tmp_path, 2, deadline=20)
    assert asked == [2]
    assert len([record for record in caplog.records if "the run goes on" in record.message]) == 1


def test_a_run_that_has_ended_is_said_to_be_none(tmp_path, watch):
    watch(0, 1).close()
    assert not (tmp_path / "control").exists()
    with pytest.raises(LookupError, match="no live run writes into"):
        known_ranks(tmp_path)
    done = CliRunner().invoke(app, ["profile", str(tmp_path)])
    assert done.exit_code == 2 and "no live run writes into" in " ".join(
        done.output.replace("│", " ").split()
    )


def test_ranks_of_a_larger_attempt_that_was_killed_are_left_out(tmp_path, watch):
    watch(0, 1)
    (tmp_path / "control" / "rank_5.json").write_text('{"rank": 5, "world_size": 8, "host": "n", "pid": 1}')
    assert [one.rank for one in known_ranks(tmp_path)] == [0]

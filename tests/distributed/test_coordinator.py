"""Rank 1 waits while rank 0, another process, works, fails, hangs, stops or dies."""

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.ranks import Rank
from helpers.torchrun import worker_environment

from megatron_laser.distributed.coordinator import Coordinator, RankZeroFailed

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("coordinator_worker.py")
SILENCE = 4.0  # run.deadline of the waiting rank
TIMEOUT = timedelta(seconds=20)


def start(port, scenario):
    return Rank(WORKER, [str(port), scenario], worker_environment())


@contextlib.contextmanager
def rank_zero(scenario):
    """(store as rank 1 sees it, coordinator of rank 1, rank 0's process), once rank 0's heart beats."""
    base = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    process = start(base.port, scenario)
    try:
        store = dist.PrefixStore("run", base)
        while not store.check(["heartbeat/0"]):
            assert process.poll() is None, process.output
            time.sleep(0.05)
        yield base, Coordinator(store, 1, 2, deadline=SILENCE), process
    finally:
        process.end()


def finished(process):
    assert process.wait(30) == 0, process.output


def test_the_waiting_rank_goes_on_when_rank_zero_has_finished():
    with rank_zero("works") as (store, coordinator, process):
        started = time.monotonic()
        called = []
        assert (
            coordinator.run_on_rank_zero("rollout of step 3", lambda: called.append(1), deadline=60) is None
        )
        assert not called
        assert time.monotonic() - started < 9
        store.set("seen", "")
        finished(process)


def test_many_phases_in_a_row_stay_in_step():
    with rank_zero("many phases") as (store, coordinator, process):
        for number in range(40):
            assert coordinator.run_on_rank_zero(f"phase {number}", lambda: None, deadline=60) is None
            store.set(f"seen {number}", "")
        finished(process)


def test_the_waiting_rank_gets_rank_zeros_failure_message():
    with rank_zero("fails") as (store, coordinator, process):
        message = r"rank 1, phase 'rollout of step 3': .*ValueError: the grading pool lost its workers"
        with pytest.raises(RuntimeError, match=message):
            coordinator.run_on_rank_zero("rollout of step 3", lambda: None, deadline=60)
        store.set("seen", "")
        finished(process)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_silent_rank_zero_is_noticed_within_the_deadline_with_rank_and_phase(how):
    with rank_zero("hangs") as (_, coordinator, process):
        os.kill(process.pid, how)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1, phase 'rollout of step 3': .*no sign of life.*4 s"):
            coordinator.run_on_rank_zero("rollout of step 3", lambda: None, deadline=30)
        assert SILENCE <= time.monotonic() - started < SILENCE + 15


def test_a_rank_zero_that_is_alive_but_too_slow_is_told_apart_from_a_dead_one():
    with rank_zero("hangs") as (_, coordinator, _):
        started = time.monotonic()
        with pytest.raises(
            RuntimeError, match=r"phase 'rollout of step 3'.*alive.*within 3 s.*rollout\.deadline"
        ):
            coordinator.run_on_rank_zero("rollout of step 3", lambda: None, deadline=3.0)
        assert time.monotonic() - started < 18


def test_the_death_of_the_process_that_hosts_the_store_is_told_with_rank_and_phase():
    process = start(0, "hosts the store")
    try:
        until = time.monotonic() + 30
        while "\n" not in process.output:
            assert process.poll() is None and time.monotonic() < until, process.output
            time.sleep(0.05)
        store = dist.TCPStore("127.0.0.1", int(process.output), is_master=False, timeout=TIMEOUT)
        store = dist.PrefixStore("run", store)
        store.wait(["heartbeat/0"], TIMEOUT)
        coordinator = Coordinator(store, 1, 2, deadline=SILENCE)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"rank 1, phase 'rollout of step 3': rank 0, .*store.* gone"):
            coordinator.run_on_rank_zero("rollout of step 3", lambda: None, deadline=30)
    finally:
        process.end()


def test_a_rank_zero_that_never_starts_is_noticed():
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match=r"rank 1, phase 'reading inputs': .*no sign of life"):
        Coordinator(store, 1, 2, deadline=0.5).run_on_rank_zero("reading inputs", lambda: None, deadline=30)


def test_a_failed_rank_zero_stays_until_the_others_have_heard_of_it():
    store = dist.HashStore()
    first, second = (Coordinator(store, rank, 2, deadline=30.0) for rank in range(2))

    def come_late():
        time.sleep(0.3)
        with contextlib.suppress(RankZeroFailed):
            second.run_on_rank_zero("work", lambda: None, deadline=30.0)

    thread = threading.Thread(target=come_late)
    thread.start()
    with pytest.raises(ZeroDivisionError):
        first.run_on_rank_zero("work", lambda: 1 / 0, deadline=30.0)
    assert store.check(["phase/0/heard/1"])
    thread.join()
    for one in (first, second):
        one.close()


def test_alone_there_is_nobody_to_wait_for():
    coordinator = Coordinator(dist.HashStore(), 0, 1, deadline=1.0)
    assert coordinator.run_on_rank_zero("work", lambda: 5, deadline=1.0) == 5
    coordinator.close()


def test_rank_zeros_own_failure_is_raised_as_it_is_on_rank_zero():
    coordinator = Coordinator(dist.HashStore(), 0, 2, deadline=1.0)
    with pytest.raises(ZeroDivisionError):
        coordinator.run_on_rank_zero("work", lambda: 1 / 0, deadline=1.0)
    coordinator.close()
    coordinator.close()

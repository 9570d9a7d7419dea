"""Heartbeats in one process: what the table of ranks says, and when the watchdog acts."""

import re
import time

import pytest
import torch.distributed as dist

from megatron_laser.distributed.coordinator import Coordinator
from megatron_laser.distributed.heartbeat import Heartbeats


@pytest.fixture
def hearts():
    store = dist.HashStore()
    made = []

    def make(rank, world_size=2, deadline=2.0, **settings):
        made.append(Heartbeats(store, rank, world_size, deadline=deadline, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def silence(heart):
    """As if its process had been killed: no more beats, and no farewell."""
    heart._stop.set()
    heart._thread.join()


def phase_of(heart, rank):
    """The phase that `rank` last sent; "" before its first beat."""
    beat = heart.latest(rank)
    return "" if beat is None else beat.phase


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_the_table_tells_the_living_the_silent_the_failed_and_those_that_never_came(hearts):
    first, second, third = hearts(0, 4), hearts(1, 4), hearts(2, 4, detail=lambda: "logprob")
    first.enter("train step 7")
    second.enter("train step 6")
    third.enter("train step 7")
    assert wait_for(lambda: phase_of(third, 2) == "train step 7: logprob")
    assert wait_for(lambda: phase_of(third, 1) == "train step 6" and phase_of(third, 0) == "train step 7")
    silence(second)
    third.fail(ValueError("bad\nluck"))
    lines = first.table().splitlines()
    assert lines[0] == "ranks as rank 0 sees them:"
    assert re.match(r"  rank 1: no heartbeat for \d+ s, last phase 'train step 6', at ", lines[1])
    assert lines[2] == "  rank 3: never gave a sign of life"
    assert lines[3] == "  rank 2: failed with ValueError: bad, phase 'train step 7: logprob'"
    assert lines[4].startswith("  rank 0: alive, in phase 'train step 7' for ")


def test_the_watchdogs_of_all_ranks_act_when_one_rank_falls_silent(hearts):
    reasons = {}
    first, second, third = (hearts(rank, 3, deadline=1.0) for rank in range(3))
    first.watch(lambda reason: reasons.setdefault(0, reason))
    third.watch(lambda reason: reasons.setdefault(2, reason))
    time.sleep(1.5)
    assert not reasons
    silence(second)
    assert wait_for(lambda: len(reasons) == 2)
    assert reasons[0] == reasons[2]
    assert reasons[0].startswith("rank 1 gave no sign of life for ")
    assert "\n  rank 1: no heartbeat for " in reasons[0]


def test_a_silent_rank_zero_is_noticed_by_the_others(hearts):
    reasons = []
    first, second = hearts(0, deadline=1.0), hearts(1, deadline=1.0)
    second.watch(reasons.append)
    silence(first)
    assert wait_for(lambda: reasons)
    assert reasons[0].startswith("rank 0 gave no sign of life for ")


def test_a_rank_that_failed_but_does_not_end_is_not_waited_for(hearts):
    reasons = []
    first, second = hearts(0, deadline=1.0), hearts(1, deadline=1.0)
    first.watch(reasons.append)
    second.fail(MemoryError("no memory"))
    assert wait_for(lambda: reasons)
    assert reasons[0].startswith("rank 1 failed with MemoryError: no memory, and this rank still waits")


def test_a_rank_that_left_is_not_missed(hearts):
    reasons = []
    first, second = hearts(0, deadline=1.0), hearts(1, deadline=1.0)
    first.watch(reasons.append)
    second.close()
    time.sleep(5.0)
    assert not reasons


def test_the_error_of_a_collective_is_completed_with_the_table():
    store = dist.HashStore()
    coordinator = Coordinator(store, 0, 2, deadline=5.0)
    with pytest.raises(RuntimeError, match="connection closed") as error, coordinator.phase("train step 12"):
        raise RuntimeError("connection closed by peer")
    (note,) = error.value.__notes__
    assert note.startswith("rank 0, phase 'train step 12'; ranks as rank 0 sees them:\n")
    assert "rank 1: never gave a sign of life" in note
    coordinator.close()

"""Ranks that are started again share a store with those that died, and nothing else."""

import threading

import pytest
import torch.distributed as dist

from megatron_laser.distributed.rendezvous import agree_on_life


def start(store, ranks, grace=20.0):
    """All of `ranks` of three at once, as torchrun starts them; {rank: the name that it got, or its error}."""
    found = {}

    def run(rank):
        try:
            found[rank] = agree_on_life(store, rank, 3, grace)
        except RuntimeError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    return found, threads


def names(store):
    found, threads = start(store, (2, 1, 0))
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def store():
    return dist.HashStore()


def test_each_start_has_a_name_that_all_its_ranks_know_and_no_earlier_one_had(store):
    lives = [names(store) for _ in range(3)]
    assert all(set(life) == {0, 1, 2} and len(set(life.values())) == 1 for life in lives)
    assert len({life[0] for life in lives}) == 3


def test_a_start_that_died_half_way_confuses_nobody(store):
    """Rank 0 waits for rank 2, which is gone; then all three come again."""
    found, threads = start(store, (0, 1), grace=0.3)
    for thread in threads:
        thread.join(30)
    assert "ranks [2] did not come" in str(found[0])
    life = names(store)
    assert len(set(life.values())) == 1 and life[0] not in found.values()


def test_a_rank_that_came_before_it_was_started_again_is_answered_under_its_new_name(store):
    store.set("came/1", "the name of a dead process")
    life = names(store)
    assert len(set(life.values())) == 1

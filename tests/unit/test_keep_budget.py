"""How much a log-prob call may keep for its backward: the rule, once a process, lowered by running out of memory."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_laser.logprob_memory import (
    GIB,
    KEEP_CAP_BYTES,
    KEEP_CPU_BYTES,
    KEEP_STEP_BYTES,
    MIB,
    choose_keep_budget,
)
from megatron_laser.ops import memory
from megatron_laser.ops.settings import configure

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
H100, H200 = int(79.1 * GIB), 140 * GIB
LOGGER = "megatron_laser.ops.memory"


@pytest.fixture(autouse=True)
def auto():
    memory.forget_keep_budgets()
    before = configure(keep_logits_bytes=None, reserved_bytes=0)
    yield
    configure(keep_logits_bytes=before.keep_logits_bytes, reserved_bytes=before.reserved_bytes)
    memory.forget_keep_budgets()


def reader(free, total=H100):
    """A memory reader that hands out the values of `free` in turn, and may not be asked more often."""
    values = iter(free)
    return lambda device: (next(values), total)


@pytest.mark.parametrize(
    ("free", "total", "expected"),
    [
        (60 * GIB, H200, 6 * GIB),  # the cap
        (20 * GIB, H100, 6 * GIB),
        (14 * GIB, H100, 4.5 * GIB),  # (14 - 2 - 2.47) / 2 = 4.76
        (6 * GIB, H100, 0.5 * GIB),  # 0.76
        (5.4 * GIB, H100, 0),  # 0.46
        (1 * GIB, H100, 0),
        (-3 * GIB, H100, 0),
    ],
)
def test_half_of_what_is_free_after_a_reserve(free, total, expected):
    assert choose_keep_budget(int(free), total) == expected


def test_what_is_chosen_leaves_its_reserve_and_as_much_again():
    for total in (24 * GIB, H100, H200):
        last = 0
        for free in range(0, total, 100 * MIB):
            kept = choose_keep_budget(free, total)
            assert kept >= last and kept <= KEEP_CAP_BYTES and kept % KEEP_STEP_BYTES == 0
            assert kept == 0 or free - kept >= 2 * GIB + total / 32 + kept
            last = kept
        assert last == KEEP_CAP_BYTES


def test_a_cap_of_ones_own():
    assert choose_keep_budget(60 * GIB, H100, cap=20 * GIB) == 20 * GIB
    assert choose_keep_budget(60 * GIB, H100, cap=0) == 0


def test_fluctuations_of_what_is_free_change_nothing():
    middle = int(14.25 * GIB)
    assert {choose_keep_budget(middle + step * MIB, H100) for step in range(-200, 201, 10)} == {9 * GIB // 2}


def test_auto_is_looked_up_once_and_stays(caplog):
    with caplog.at_level(logging.INFO, LOGGER):
        assert memory.agreed_keep_budget(CUDA, reader=reader([14 * GIB])) == 9 * GIB // 2
        assert memory.agreed_keep_budget(CUDA, reader=reader([])) == 9 * GIB // 2
        assert memory.keep_budget(CUDA) == 9 * GIB // 2
    (said,) = caplog.messages
    assert "4.50 GiB" in said and "14.00 GiB of 79.10 GiB are free" in said
    # each device for itself
    assert memory.agreed_keep_budget(torch.device("cuda", 1), reader=reader([3 * GIB])) == 0


def test_what_others_will_allocate_is_not_given_away():
    configure(reserved_bytes=8 * GIB)
    assert memory.agreed_keep_budget(CUDA, reader=reader([22 * GIB])) == 9 * GIB // 2


def test_a_number_is_exactly_that_and_asks_nobody():
    for given in (0, 1, 12345, 40 * GIB):
        configure(keep_logits_bytes=given)
        assert memory.agreed_keep_budget(CUDA, reader=reader([])) == given
        assert memory.keep_budget(CUDA) == memory.keep_budget(CPU) == given


def test_on_a_cpu_auto_is_a_constant():
    configure(reserved_bytes=2**50)
    assert memory.agreed_keep_budget(CPU, reader=reader([])) == memory.keep_budget(CPU) == KEEP_CPU_BYTES


@pytest.mark.parametrize("given", [None, 5 * GIB])
def test_running_out_of_memory_lowers_it_and_says_once_what_to_set(given, caplog):
    configure(keep_logits_bytes=given)
    before = memory.agreed_keep_budget(CUDA, reader=reader([60 * GIB]))
    with caplog.at_level(logging.WARNING, LOGGER):
        memory.shrink_keep_budget(CUDA, 3 * GIB // 2 + 12345)
        assert memory.keep_budget(CUDA) == 3 * GIB // 2 + 12345
        (said,) = caplog.messages
        pinned = float(said.rpartition("model.keep_logits_gib: ")[2])
        assert round(pinned * GIB) == 3 * GIB // 2 + 12345
        memory.shrink_keep_budget(CUDA, GIB)
        memory.shrink_keep_budget(CUDA, 2 * GIB)  # lowered, never raised
        assert memory.keep_budget(CUDA) == GIB
    assert len(caplog.messages) == 1
    # what the ranks of a group have decided together stays as it was, and so do other devices
    assert memory.agreed_keep_budget(CUDA, reader=reader([])) == before
    assert memory.keep_budget(CPU) == (KEEP_CPU_BYTES if given is None else given)
    configure(keep_logits_bytes=7)
    assert memory.keep_budget(CUDA) == 7


def test_the_ranks_that_share_a_vocabulary_take_the_least_of_theirs(monkeypatch):
    """A group whose other rank has 1.5 GiB; one collective, at the first call."""

    class Group:
        group_name = "tensor"

    sent = []

    def all_reduce(tensor, op, group):
        assert op == torch.distributed.ReduceOp.MIN and group.group_name == "tensor"
        sent.append(int(tensor))
        tensor.clamp_(max=3 * GIB // 2)

    monkeypatch.setattr(memory, "group_size", lambda group: 2)
    monkeypatch.setattr(memory.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(memory.torch, "tensor", lambda value, device: torch.full((), value))
    group = Group()
    assert memory.agreed_keep_budget(CUDA, group, reader([14 * GIB])) == 3 * GIB // 2
    assert memory.agreed_keep_budget(CUDA, group, reader([])) == 3 * GIB // 2
    assert sent == [9 * GIB // 2]


@pytest.mark.parametrize("changes", [{"keep_logits_bytes": -1}, {"reserved_bytes": -1}, {"tile_bytes": 0}])
def test_sizes_that_are_none_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}={next(iter(changes.values()))}"):
        configure(**changes)

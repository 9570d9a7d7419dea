"""What the tracker says is allocated, against cases that are worked out by hand."""

import pytest
import torch
import torch.distributed as dist

from megatron_laser.benchmarks import memory_tracker
from megatron_laser.benchmarks.memory_tracker import MemoryTracker, without

MATRIX = 4 * 256 * 256
NUMBERS = range(64)  # bytes of single numbers, which torch makes a tensor of as well


def test_tensors_are_counted_from_when_they_are_made_until_the_last_of_their_views_is_gone():
    with MemoryTracker() as tracker:
        with tracker.span("first"):
            kept = torch.zeros(256, 256)
            view = kept[0]
        with tracker.span("second"):
            gone = kept.exp()  # 2 matrices
            gone = gone.log()  # 3, then 2
            del kept  # its view holds all of it
            more = gone + 1  # 3
        del view  # now 2
        with tracker.span("third"):
            del gone, more
    ((begin, _), (_, middle), (last, end)) = (tracker.spans(name)[0] for name in ("first", "second", "third"))
    assert tracker.live(begin) == 0
    assert tracker.peak(tracker.spans("first")) == MATRIX
    assert tracker.peak(tracker.spans("second")) - 3 * MATRIX in NUMBERS
    assert [tracker.live(moment) for moment in (middle, last, end)] == [3 * MATRIX, 2 * MATRIX, 0]
    assert tracker.spans("fourth") == [] and tracker.peak([]) == 0


def test_what_autograd_keeps_and_its_gradients_are_counted_though_python_never_holds_them():
    weight = torch.zeros(256, 256, requires_grad=True)
    with MemoryTracker() as tracker:
        with tracker.span("forward"):
            result = (weight.exp().exp()).mul(2.0).sum()  # both exponentials are kept, their double is not
        with tracker.span("backward"):
            result.backward()
    ((_, between),), ((_, end),) = tracker.spans("forward"), tracker.spans("backward")
    assert tracker.peak(tracker.spans("forward")) - 3 * MATRIX in NUMBERS
    assert tracker.live(between) - 2 * MATRIX in NUMBERS
    assert tracker.live(end) - MATRIX in NUMBERS  # weight.grad alone
    # The sum's gradient is one number; the double's is a matrix, and each exponential's another beside what it had.
    assert tracker.peak(tracker.spans("backward")) - 4 * MATRIX in NUMBERS


def test_an_operations_own_workspace_is_counted():
    values = torch.rand(1 << 16)
    with MemoryTracker() as tracker, tracker.span("median"):
        values.median()  # copies what it sorts
    assert tracker.peak(tracker.spans("median")) >= values.nbytes


@pytest.fixture
def alone():
    """A gloo group of this process alone, whose collectives run in gloo's threads like those of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_collectives_copy_is_counted_and_what_they_leave_is_the_callers(alone, monkeypatch):
    monkeypatch.setattr(memory_tracker, "_LET_GO", 0.1)  # however busy the machine is
    own = torch.zeros(256, 256)
    with MemoryTracker() as tracker:
        with tracker.span("gather"):
            for _ in range(5):
                everyone = torch.empty(256, 256)
                dist.all_gather_into_tensor(everyone, own)
                del everyone
        with tracker.span("scatter"):
            share = torch.empty(256, 256)
            dist.reduce_scatter_tensor(share, own)
    ((begin, end),) = tracker.spans("gather")
    assert tracker.live(begin) == tracker.live(end) == 0  # nothing of 5 was lost
    assert tracker.peak(tracker.spans("gather")) == 2 * MATRIX  # the result, and gloo's flat one
    ((_, end),) = tracker.spans("scatter")
    assert tracker.peak(tracker.spans("scatter")) == 2 * MATRIX
    assert tracker.live(end) == MATRIX


def test_spans_without_others_are_what_is_left_around_them():
    assert without([(0, 10)], []) == [(0, 10)]
    assert without([(0, 10), (20, 30)], [(2, 4), (8, 22)]) == [(0, 2), (4, 8), (22, 30)]
    assert without([(0, 10)], [(0, 10)]) == []


def test_a_collectives_own_function_is_back_afterwards():
    before = dist.Work.wait
    with pytest.raises(ZeroDivisionError), MemoryTracker():
        raise ZeroDivisionError
    assert dist.Work.wait is before

"""Threads of groups that are left in cycles end behind the test that left them."""

import gc

import torch.distributed as dist
from helpers import forgotten_threads


class Owner:
    """Has a group, and itself."""

    def __init__(self):
        # Without the default group: another test of this process may have that.
        self.group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
        self.me = self


def test_groups_in_cycles_are_found_when_there_are_many_threads(monkeypatch):
    gc.collect()
    before = forgotten_threads.threads()
    monkeypatch.setattr(forgotten_threads, "_left", before)
    gc.disable()
    try:
        for _ in range(2):
            Owner()
        left = forgotten_threads.threads() - before
        assert left >= 2
        monkeypatch.setattr(forgotten_threads, "MOST", left)
        forgotten_threads.end_forgotten_threads()
        assert forgotten_threads.threads() == before + left
        monkeypatch.setattr(forgotten_threads, "MOST", left - 1)
        forgotten_threads.end_forgotten_threads()
        assert forgotten_threads.threads() == before
    finally:
        gc.enable()

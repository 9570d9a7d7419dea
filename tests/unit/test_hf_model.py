"""The key-value cache of the in-process engine's model: upstream's, with room to grow."""

import torch
from transformers.cache_utils import DynamicLayer

from megatron_laser.rollout.hf_model import RoomyLayer


def test_a_cache_with_room_is_what_upstream_s_is(monkeypatch):
    monkeypatch.setattr(RoomyLayer, "ROOM", 3)
    generator = torch.Generator().manual_seed(0)
    mine, theirs = RoomyLayer(), DynamicLayer()
    rows = 4
    for step, width in enumerate((5, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1)):
        keys, values = (torch.randn(rows, 2, width, 8, generator=generator) for _ in range(2))
        for got, want in zip(mine.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(got, want), step
        assert mine.get_seq_length() == theirs.get_seq_length()
        if step == 3:
            for layer in (mine, theirs):
                layer.batch_select_indices(torch.tensor([0, 2]))
            rows = 2
        if step == 6:
            for layer in (mine, theirs):
                layer.batch_repeat_interleave(3)
            rows = 6


def test_adding_a_token_copies_no_cache_while_there_is_room():
    layer = RoomyLayer()
    token = torch.zeros(2, 1, 1, 4)
    layer.update(token, token)
    first = layer.keys.data_ptr()
    for _ in range(RoomyLayer.ROOM):
        layer.update(token, token)
    assert layer.keys.data_ptr() == first
    layer.update(token, token)
    assert layer.keys.data_ptr() != first

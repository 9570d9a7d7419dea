"""Packed causal attention whose responses share their group's prompt, through torch SDPA.

For layers without Transformer Engine and for float32, beside `torch_layers`. The queries of a response see the keys of
the prompt, which were computed once, and their own up to themselves; the gradients of the prompt's keys and values
are the sums over its responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_laser.model.sequence_batches import (
    PaddedBatch,
    attend_up_to,
    heads_first,
    padded_batch,
    similar_lengths,
)


@dataclass(frozen=True)
class ResponseBatch:
    """A right-padded batch of sequences that stand behind shared ones.

    keys [batch, width] int64: the packed rows of the shared sequence and then of the own one; row 0 in padding, which
    no query sees. positions [batch, queries.width] int64: each query's place among them; 0 in padding, whose result
    is dropped. furthest: for each column of queries the last place, on the host.
    """

    queries: PaddedBatch
    keys: torch.Tensor
    positions: torch.Tensor
    furthest: tuple[int, ...]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """The result of the batch's real tokens [tokens, heads, head_dim], in the order of `queries.rows`."""
        q = heads_first(query, self.queries)
        k, v = (
            x.index_select(0, self.keys.flatten()).view(*self.keys.shape, *x.shape[1:]).transpose(1, 2)
            for x in (key, value)
        )
        out = attend_up_to(q, k, v, self.positions, self.furthest, scale)
        return out.transpose(1, 2).reshape(-1, *query.shape[1:]).index_select(0, self.queries.slots)


def response_batches(
    bounds: torch.Tensor, parents: np.ndarray, device: torch.device
) -> tuple[ResponseBatch, ...]:
    """All sequences that have a parent, in batches of similar length.

    Args:
        bounds: [sequences + 1] int64 on the host, where each packed sequence starts, then all tokens.
        parents: [sequences] int64, as in `batching.PackedMicroBatch`.
    """
    above = torch.from_numpy(parents)
    starts, lengths = bounds[:-1], bounds.diff()
    behind = (above >= 0).nonzero().squeeze(1)
    before = torch.where(above >= 0, lengths[above], 0)
    batches = []
    for some in similar_lengths((lengths + before)[behind]):
        for chosen in similar_lengths(lengths[behind[some]]):
            members = behind[some[chosen]]
            own = padded_batch(starts[members], lengths[members], device)
            shared = before[members][:, None]
            place = torch.arange(int((lengths + before)[members].max()))
            rows = torch.where(
                place < shared,
                starts[above[members]][:, None] + place,
                starts[members][:, None] + place - shared,
            )
            rows = torch.where(place < shared + lengths[members][:, None], rows, 0)
            offsets = torch.arange(own.width)
            positions = torch.where(offsets < lengths[members][:, None], shared + offsets, 0)
            batches.append(
                ResponseBatch(own, rows.to(device), positions.to(device), tuple(positions.amax(0).tolist()))
            )
    return tuple(batches)

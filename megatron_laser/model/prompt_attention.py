"""Packed causal attention whose responses share their group's prompt, through torch SDPA.

For layers without Transformer Engine and for float32, beside `torch_layers`. The queries of a response see the keys of
the prompt, which were computed once, and their own up to themselves; the gradients of the prompt's keys and values
are the sums over its responses. A prompt may stand behind what it shares with others in the same way.
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

    keys [batch, width] int64: the packed rows of the shared sequences and then of the own one; row 0 in padding, which
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
    starts, lengths = bounds[:-1].tolist(), bounds.diff()
    chains = [_chain(parents, sequence) for sequence in range(len(parents))]
    before = torch.tensor([sum(int(lengths[one]) for one in chain) for chain in chains])
    behind = (torch.from_numpy(parents) >= 0).nonzero().squeeze(1)
    batches = []
    for some in similar_lengths((lengths + before)[behind]):
        for chosen in similar_lengths(lengths[behind[some]]):
            members = behind[some[chosen]]
            own = padded_batch(bounds[:-1][members], lengths[members], device)
            keys = torch.zeros(len(members), int((lengths + before)[members].max()), dtype=torch.int64)
            for row, member in zip(keys, members.tolist()):
                place = 0
                for one in (*chains[member], member):
                    size = int(lengths[one])
                    torch.arange(starts[one], starts[one] + size, out=row[place : place + size])
                    place += size
            offsets = torch.arange(own.width)
            shared = before[members][:, None]
            positions = torch.where(offsets < lengths[members][:, None], shared + offsets, 0)
            batches.append(
                ResponseBatch(own, keys.to(device), positions.to(device), tuple(positions.amax(0).tolist()))
            )
    return tuple(batches)


def _chain(parents: np.ndarray, sequence: int) -> list[int]:
    """A sequence's parent and the parents before it, the first one first."""
    chain: list[int] = []
    while (sequence := int(parents[sequence])) >= 0:
        chain.append(sequence)
    return chain[::-1]

"""Which labelled rows of a packed micro-batch have a log-prob over the set that their token was sampled from."""

from __future__ import annotations

import numpy as np
import torch

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.batching.packing import PackedMicroBatch, positions_in
from megatron_laser.model.policy_model import RowSets
from megatron_laser.ops import Sets


def row_sets(flat: FlatBatch, packed: PackedMicroBatch, device: torch.device) -> RowSets | None:
    """The sets of the policy rows of the micro-batch, or of a context rank's share; None: no row has one.

    Score rows have none: the score is of the whole vocabulary.
    """
    if not len(flat.set_counts):
        return None
    tokens = flat.response_offsets[packed.sample_index] + packed.response_position
    # A score row's place may be behind its response, and behind all of them: no token of the batch is its own.
    tokens[packed.is_score] = 0
    counts = np.where(packed.is_score, 0, flat.set_counts[tokens]).astype(np.int64)
    rows = np.flatnonzero(counts)
    if not len(rows):
        return None
    own = counts[rows]
    ids = flat.set_ids[np.repeat(flat.set_offsets[tokens[rows]], own) + positions_in(own)]
    return RowSets(
        rows=rows,
        others=np.flatnonzero(counts == 0),
        sets=Sets(
            torch.from_numpy(ids.astype(np.int64)).to(device),
            torch.from_numpy(np.concatenate(([0], np.cumsum(own)))),
        ),
    )

"""Where a rollout batch is read: the points of all readouts, the same on every rank, and the rows that they become.

A point is one place of one response: behind its first `offset` tokens. Each of a readout's tokens is one labelled row
there, and has one *slot*, its place in the vector of all log-probs that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.batching.packing import Marks

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReadoutPoints:
    """Points of R readouts, one readout after the other, each by sample and place.

    sample, offset: [points] int64. starts: [R + 1] where each readout's points begin. token_ids: the R readouts'.
    continuation: [tokens] int64, what stands behind each of the responses `continued`, [samples] bool, for reading
    only; offsets go on over it.
    """

    sample: Ints
    offset: Ints
    starts: Ints
    token_ids: tuple[tuple[int, ...], ...]
    continuation: Ints
    continued: npt.NDArray[np.bool_]

    @property
    def counts(self) -> Ints:
        """[R] points of each readout."""
        return np.diff(self.starts)

    @cached_property
    def slot_starts(self) -> Ints:
        """[R + 1] where each readout's slots begin; the last one is how many there are."""
        sizes = self.counts * np.array([len(ids) for ids in self.token_ids], dtype=np.int64)
        return np.concatenate(([0], np.cumsum(sizes)))

    def of(self, readout: int) -> slice:
        """The points of a readout."""
        return slice(int(self.starts[readout]), int(self.starts[readout + 1]))

    def slots_of(self, readout: int) -> slice:
        """The slots of a readout: [points, tokens], flat."""
        return slice(int(self.slot_starts[readout]), int(self.slot_starts[readout + 1]))

    @cached_property
    def _rows(self) -> tuple[Ints, Ints, Ints, Ints]:
        """(sample, offset, label, slot) of all rows, by sample."""
        empty = np.zeros(0, dtype=np.int64)
        parts = [(empty, empty, empty)]
        for readout, ids in enumerate(self.token_ids):
            own = self.of(readout)
            label = np.tile(np.array(ids, dtype=np.int64), own.stop - own.start)
            parts.append(
                (np.repeat(self.sample[own], len(ids)), np.repeat(self.offset[own], len(ids)), label)
            )
        sample, offset, label = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.argsort(sample, kind="stable")
        return sample[order], offset[order], label[order], np.arange(len(order), dtype=np.int64)[order]

    def marks(self, sample: int) -> Marks:
        """The rows of one sample, as `pack` takes them."""
        samples, offset, label, slot = self._rows
        own = slice(*np.searchsorted(samples, (sample, sample + 1)).tolist())
        return Marks(offset[own], label[own], slot[own])

    def appended(self, sample: int) -> Ints:
        """What stands behind the response of one sample for reading only, as `pack` takes it."""
        return self.continuation if self.continued[sample] else self.continuation[:0]

    @cached_property
    def appended_tokens(self) -> Ints:
        """[samples] how many tokens that is."""
        return self.continued * len(self.continuation)


def readout_points(
    flat: FlatBatch,
    places: Sequence[Callable[[FlatBatch, int], npt.NDArray[np.integer]]],
    token_ids: Sequence[tuple[int, ...]],
    continuation: Sequence[int] = (),
) -> ReadoutPoints:
    """The points of a batch.

    Args:
        places: for each readout, (batch, sample) -> increasing offsets into its response; empty for none.
        token_ids: for each readout, what is read.
        continuation: what is put behind each response that was cut off; empty: nothing is.
    """
    samples, offsets, starts = [], [], [0]
    for place in places:
        found = [place(flat, sample).astype(np.int64) for sample in range(flat.num_samples)]
        counts = np.array([len(item) for item in found], dtype=np.int64)
        samples.append(np.repeat(np.arange(flat.num_samples, dtype=np.int64), counts))
        offsets += found
        starts.append(starts[-1] + int(counts.sum()))
    empty = np.zeros(0, dtype=np.int64)
    return ReadoutPoints(
        np.concatenate([empty, *samples]),
        np.concatenate([empty, *offsets]),
        np.array(starts, dtype=np.int64),
        tuple(token_ids),
        np.array(continuation, dtype=np.int64),
        flat.cut_off() if len(continuation) else np.zeros(flat.num_samples, dtype=np.bool_),
    )


def at_end(flat: FlatBatch, sample: int) -> Ints:
    """Behind the last token of a response that has a score."""
    length = int(flat.response_lengths[sample])
    return np.array([length] if flat.scored[sample] and length else [], dtype=np.int64)


def before_end(flat: FlatBatch, sample: int) -> Ints:
    """Where the last token of a response that has a score was sampled."""
    return at_end(flat, sample) - 1


def behind_forced(tokens: int) -> Callable[[FlatBatch, int], Ints]:
    """Behind the `tokens` tokens that are put behind a response that was cut off."""

    def place(flat: FlatBatch, sample: int) -> Ints:
        length = int(flat.response_lengths[sample])
        return np.array([length + tokens] if flat.cut_off()[sample] else [], dtype=np.int64)

    return place


def every(tokens: int) -> Callable[[FlatBatch, int], Ints]:
    """Behind each `tokens` tokens of any response, but not behind its last."""

    def place(flat: FlatBatch, sample: int) -> Ints:
        return np.arange(tokens, int(flat.response_lengths[sample]), tokens, dtype=np.int64)

    return place


def prefix_values(flat: FlatBatch, sample: Ints, offset: Ints) -> npt.NDArray[np.float64]:
    """[points] mean reward of the group's responses that begin with the point's own first `offset` tokens.

    A Monte-Carlo estimate of the prefix's value; every group member counts once, the response itself included.
    """
    values = np.empty(len(sample), dtype=np.float64)
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(flat.group_ids.tolist()):
        groups.setdefault(group, []).append(index)
    shared: dict[int, tuple[Ints, npt.NDArray[np.float64]]] = {}
    for place, (index, length) in enumerate(zip(sample.tolist(), offset.tolist())):
        if index not in shared:
            members = groups[int(flat.group_ids[index])]
            own = flat.response_ids(index)
            common = [_common(own, flat.response_ids(other)) for other in members]
            shared[index] = (np.array(common), flat.rewards[members].astype(np.float64))
        common_tokens, rewards = shared[index]
        values[place] = rewards[common_tokens >= length].mean()
    return values


def _common(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """With how many equal tokens two responses begin."""
    shortest = min(len(one), len(other))
    differs = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(differs[0]) if len(differs) else shortest

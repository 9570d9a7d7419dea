"""Which samples go to which data-parallel rank in which micro-batch, by tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SampleIndexes = tuple[int, ...]  # of one micro-batch, ascending; empty for one without samples


@dataclass(frozen=True, slots=True)
class Schedule:
    """`minibatches[m][rank][k]`: the samples of micro-batch k of data-parallel rank `rank` in minibatch m."""

    minibatches: tuple[tuple[tuple[SampleIndexes, ...], ...], ...]

    def num_micro_batches(self, minibatch: int) -> int:
        """Micro-batches that every rank runs in this minibatch."""
        return len(self.minibatches[minibatch][0])


def build_schedule(
    lengths: Sequence[int],
    *,
    data_parallel: int,
    tokens_per_micro_batch: int,
    minibatches: int = 1,
    group_ids: Sequence[int] | None = None,
    micro_batch_multiple: int = 1,
) -> Schedule:
    """Cut a rollout batch into minibatches, data-parallel ranks and micro-batches.

    Invariants:
    - every sample is in exactly one micro-batch;
    - minibatches are contiguous runs of whole groups, in order; their numbers of groups differ by at most 1;
    - the tokens of two ranks in one minibatch differ by at most its longest sample;
    - a micro-batch holds at most `tokens_per_micro_batch` tokens (before padding) or one longer sample;
    - all ranks run the same number of micro-batches in a minibatch, a positive multiple of
      `micro_batch_multiple`; micro-batches without samples are empty tuples, at the end;
    - a rank's micro-batches are filled evenly where the budget allows it and run from most to fewest tokens,
      so that those that different ranks run at the same time are alike;
    - the result depends on the arguments only: every rank can compute it by itself.

    Args:
        lengths: prompt plus response tokens of each sample, at least 1.
        data_parallel: number of data-parallel ranks.
        tokens_per_micro_batch: the setting `batching.tokens_per_micro_batch`.
        minibatches: optimizer steps per rollout batch (`policy.minibatches`), at most the number of groups.
        group_ids: the group of each sample, samples of a group next to each other. None: every sample is a
            group of its own.
        micro_batch_multiple: the pipeline size for interleaved (virtual) pipelines, which need it.

    Raises:
        ValueError: an argument out of range, a group that is not contiguous, more minibatches than groups.
    """
    for name, value in (
        ("data_parallel", data_parallel),
        ("tokens_per_micro_batch", tokens_per_micro_batch),
        ("minibatches", minibatches),
        ("micro_batch_multiple", micro_batch_multiple),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")
    lengths = [int(length) for length in lengths]
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{index}]={length}: expected at least 1 token in every sample.")
    starts = _group_starts(len(lengths), group_ids)
    if minibatches > len(starts):
        raise ValueError(
            f"policy.minibatches={minibatches}: expected at most the {len(starts)} group(s) of the rollout "
            "batch; lower it or raise rollout.prompts_per_step."
        )
    starts = [*starts, len(lengths)]
    edges = [starts[m * (len(starts) - 1) // minibatches] for m in range(minibatches + 1)]
    return Schedule(
        tuple(
            _minibatch(
                range(first, last), lengths, data_parallel, tokens_per_micro_batch, micro_batch_multiple
            )
            for first, last in pairwise(edges)
        )
    )


def _group_starts(samples: int, group_ids: Sequence[int] | None) -> list[int]:
    """The index of the first sample of each group."""
    if group_ids is None:
        return list(range(samples))
    if len(group_ids) != samples:
        raise ValueError(f"group_ids has {len(group_ids)} entries for {samples} samples: expected one each.")
    starts = [i for i in range(samples) if i == 0 or group_ids[i] != group_ids[i - 1]]
    if len({int(group_ids[i]) for i in starts}) != len(starts):
        raise ValueError(
            "group_ids: the samples of a group must be next to each other; sort the batch by group."
        )
    return starts


def _minibatch(
    samples: range, lengths: Sequence[int], data_parallel: int, budget: int, multiple: int
) -> tuple[tuple[SampleIndexes, ...], ...]:
    # Longest first into the least loaded (LPT). Ties go to the lower index, so the result is unique.
    longest_first = sorted(samples, key=lambda i: (-lengths[i], i))
    ranks = _spread(longest_first, lengths, data_parallel)
    packed = [_first_fit(rank, lengths, budget) for rank in ranks]
    count = max(1, *(len(bins) for bins in packed))
    count = -(-count // multiple) * multiple
    return tuple(_even(rank, bins, lengths, budget, count) for rank, bins in zip(ranks, packed))


def _spread(longest_first: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Each sample to the bin with the fewest tokens."""
    result: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, index) for index in range(bins)]
    for sample in longest_first:
        load, index = loads[0]
        result[index].append(sample)
        heapq.heapreplace(loads, (load + lengths[sample], index))
    return result


def _first_fit(longest_first: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each sample to the first bin with room, else to a new one: few bins. Longer samples get their own."""
    result: list[list[int]] = []
    room: list[int] = []
    for sample in longest_first:
        length = lengths[sample]
        index = next((i for i, left in enumerate(room) if length <= left), None)
        if index is None:
            result.append([sample])
            room.append(budget - length)
        else:
            result[index].append(sample)
            room[index] -= length
    return result


def _even(
    longest_first: Sequence[int], packed: list[list[int]], lengths: Sequence[int], budget: int, count: int
) -> tuple[SampleIndexes, ...]:
    """`count` bins: evenly filled where that stays within the budget, else as `packed` (at most `count`)."""
    alone = [[sample] for sample in longest_first if lengths[sample] > budget]
    rest = longest_first[len(alone) :]
    even = _spread(rest, lengths, count - len(alone)) if rest else []
    if any(sum(lengths[i] for i in members) > budget for members in even):
        bins = packed
    else:
        bins = alone + even
    bins = bins + [[] for _ in range(count - len(bins))]
    bins.sort(key=lambda members: -sum(lengths[i] for i in members))
    return tuple(tuple(sorted(members)) for members in bins)

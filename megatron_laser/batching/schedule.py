"""Which samples go to which data-parallel rank in which micro-batch: within a budget of tokens, balanced by cost."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
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

    def imbalance(self, costs: Sequence[float]) -> float:
        """How much longer the busiest rank works than the mean one: max / mean - 1, over all minibatches.

        Every minibatch ends when its busiest rank does. 0.0 is even. Ranks that share experts meet in every layer, and
        so wait in every micro-batch: for them it is less than what they lose.
        """
        busiest = mean = 0.0
        for ranks in self.minibatches:
            loads = [sum(costs[i] for members in rank for i in members) for rank in ranks]
            busiest += max(loads)
            mean += sum(loads) / len(loads)
        return busiest / mean - 1.0 if mean else 0.0


def build_schedule(
    lengths: Sequence[int],
    *,
    data_parallel: int,
    tokens_per_micro_batch: int,
    minibatches: int = 1,
    group_ids: Sequence[int] | None = None,
    micro_batch_multiple: int = 1,
    costs: Sequence[float] | None = None,
) -> Schedule:
    """Cut a rollout batch into minibatches, data-parallel ranks and micro-batches.

    Invariants:
    - every sample is in exactly one micro-batch;
    - minibatches are contiguous runs of whole groups, in order; their numbers of groups differ by at most 1;
    - the costs of two ranks in one minibatch differ by at most that of its dearest sample;
    - a micro-batch holds at most `tokens_per_micro_batch` tokens (before padding) or one longer sample;
    - all ranks run the same number of micro-batches in a minibatch, a positive multiple of
      `micro_batch_multiple`; micro-batches without samples are empty tuples, at the end;
    - a rank's micro-batches get even costs where the budget allows it and run from the dearest to the cheapest,
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
        costs: of each sample, above 0, in any unit; None: its tokens.

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
    costs = lengths if costs is None else costs
    if len(costs) != len(lengths):
        raise ValueError(f"costs has {len(costs)} entries for {len(lengths)} samples: expected one each.")
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
                range(first, last),
                lengths,
                costs,
                data_parallel,
                tokens_per_micro_batch,
                micro_batch_multiple,
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
    samples: range,
    lengths: Sequence[int],
    costs: Sequence[float],
    data_parallel: int,
    budget: int,
    multiple: int,
) -> tuple[tuple[SampleIndexes, ...], ...]:
    ranks = _spread(samples, costs, data_parallel)
    assert ranks is not None
    packed = [_first_fit(rank, lengths, budget) for rank in ranks]
    count = max(1, *(len(bins) for bins in packed))
    count = -(-count // multiple) * multiple
    return tuple(_even(rank, bins, lengths, costs, budget, count) for rank, bins in zip(ranks, packed))


def _largest_first(samples: Iterable[int], sizes: Sequence[float]) -> list[int]:
    """Ties go to the lower index, so that the result is unique."""
    return sorted(samples, key=lambda i: (-sizes[i], i))


def _spread(
    samples: Iterable[int],
    costs: Sequence[float],
    bins: int,
    lengths: Sequence[int] = (),
    budget: int | None = None,
) -> list[list[int]] | None:
    """Dearest first into the cheapest bin (LPT) that has room for it; None where none has."""
    result: list[list[int]] = [[] for _ in range(bins)]
    room = [budget] * bins
    loads = [(0.0, index) for index in range(bins)]
    for sample in _largest_first(samples, costs):
        full = []
        while loads:
            load, index = heapq.heappop(loads)
            left = room[index]
            if left is None or lengths[sample] <= left:
                break
            full.append((load, index))
        else:
            return None
        result[index].append(sample)
        if left is not None:
            room[index] = left - lengths[sample]
        for entry in (*full, (load + costs[sample], index)):
            heapq.heappush(loads, entry)
    return result


def _first_fit(samples: Iterable[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first into the first bin with room, else into a new one: few bins. Longer samples get their own."""
    result: list[list[int]] = []
    room: list[int] = []
    for sample in _largest_first(samples, lengths):
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
    samples: Sequence[int],
    packed: list[list[int]],
    lengths: Sequence[int],
    costs: Sequence[float],
    budget: int,
    count: int,
) -> tuple[SampleIndexes, ...]:
    """`count` bins: of even costs where that stays within the budget, else as `packed` (at most `count`)."""
    alone = [[sample] for sample in samples if lengths[sample] > budget]
    rest = [sample for sample in samples if lengths[sample] <= budget]
    even = _spread(rest, costs, count - len(alone), lengths, budget) if rest else []
    bins = packed if even is None else alone + even
    bins = bins + [[] for _ in range(count - len(bins))]
    bins.sort(key=lambda members: -sum(costs[i] for i in members))
    return tuple(tuple(sorted(members)) for members in bins)

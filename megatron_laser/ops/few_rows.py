"""The few-row op around any engine: which rows, and log-probs from statistics alone, without a gradient.

Under sequence parallelism each rank holds a part of the tokens, and a handful of their rows is wanted: the ranks fill
in the rows that they have and one all-reduce of [rows, H] puts them together. All tokens are never gathered for it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_laser.ops.autograd import Problem, Reducer
from megatron_laser.ops.collectives import GatheredRows, group_rank, group_size
from megatron_laser.ops.statistics import Statistics, finish, reduced
from megatron_laser.ops.tiles import Shard, vocabulary_shard

# The neutral element of addition: 0 + -0 is 0, so adding 0 would lose the sign of a zero.
NOTHING = -0.0


class FewRows(NamedTuple):
    """One call on this rank: hidden [rows, H] contiguous, weight [V_shard, H], labels [rows] global ids."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    shard: Shard


class FewRowReducer(Protocol):
    """How the shard's columns are reduced for few rows."""

    def partials(self, problem: FewRows) -> torch.Tensor:
        """[3, parts, rows] in the accumulation dtype: per part of the columns the maximum logit, the sum of exp
        relative to it, and the label's logit (0 where another part has it).

        Only called with at least one row and one column.
        """


class StatisticsOf:
    """A `FewRowReducer` from an engine's statistics at temperature 1: one part."""

    def __init__(self, engine: Reducer) -> None:
        self._engine = engine

    def statistics(self, problem: FewRows) -> Statistics:
        """Of the shard, over all its columns."""
        hidden, weight, labels, shard = problem
        whole = Problem(GatheredRows(hidden, None), weight, labels, 1.0, shard, False)
        return self._engine.statistics(whole, for_backward=False)[0]

    def partials(self, problem: FewRows) -> torch.Tensor:
        """See `FewRowReducer`."""
        maximum, total, label_logit, _ = self.statistics(problem)
        return torch.stack([maximum, total, label_logit]).unsqueeze(1)


def check_rows(
    hidden: torch.Tensor, rows: torch.Tensor | None, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> int:
    """The number of log-probs that are asked for. Raises ValueError for `rows` that are no positions in `hidden`.

    On a CUDA device the positions themselves are not looked at, which would wait for it.
    """
    available = hidden.shape[0] * (group_size(group) if sequence_parallel else 1)
    if rows is None:
        return available
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != hidden.device:
        raise ValueError(
            f"rows is {tuple(rows.shape)} {rows.dtype} on {rows.device}: expected [n] torch.int64 on {hidden.device}, "
            "positions in `hidden` (of all ranks together with sequence_parallel=True)."
        )
    if rows.device.type == "cpu" and rows.numel():
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= available:
            raise ValueError(
                f"rows has positions from {least} to {most}: expected 0 to {available - 1}, the rows of `hidden`"
                + (f" on {group_size(group)} ranks." if sequence_parallel else ".")
            )
    return rows.shape[0]


def chosen_rows(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> torch.Tensor:
    """The rows [n, H] that are asked for, contiguous and the same on every rank."""
    if not sequence_parallel or group_size(group) == 1:
        return hidden.contiguous() if rows is None else hidden.index_select(0, rows)
    if rows is None:
        return GatheredRows(hidden.contiguous(), group).all()
    own = own_rows(hidden, rows, group_rank(group) * hidden.shape[0])
    if own.numel():
        dist.all_reduce(own, group=group)
    return own


def own_rows(hidden: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    """hidden [tokens, H] has the positions from `first` on: those among `rows` [n] as [n, H], the others `NOTHING`."""
    if not hidden.shape[0]:
        return hidden.new_full((rows.shape[0], hidden.shape[1]), NOTHING)
    local = rows - first
    inside = local.clamp(0, hidden.shape[0] - 1)
    return hidden.index_select(0, inside).masked_fill_((local != inside).unsqueeze(1), NOTHING)


def without_gradient(
    engine: Reducer,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """`megatron_laser.ops.few_row_logprob` for checked arguments, in plain torch around the engine's statistics."""
    shard = vocabulary_shard(weight, vocab_size, tp_group)
    hidden = chosen_rows(hidden, rows, tp_group, sequence_parallel)
    labels = labels.contiguous()
    local = StatisticsOf(engine).statistics(FewRows(hidden, weight, labels, shard))
    return finish(reduced(local, tp_group), labels, shard).logprobs

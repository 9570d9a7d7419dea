"""The log-prob op around any engine: statistics per row, reduced over the group; upstream gradients and dX.

The backward recomputes a tile's logits and writes, with p = exp(z - lse), the entropy E, and g and e the gradients of
logprob and E,

    dz_j = g [j = label] - p_j (g + e (log p_j + E))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_laser.ops.collectives import GatheredRows, start_reduction
from megatron_laser.ops.statistics import Statistics, finish, reduced
from megatron_laser.ops.tiles import Shard, accumulation_dtype, add_mm_, has_label, vocabulary_shard
from megatron_laser.ops.types import LogProbs
from megatron_laser.ops.weight_gradient import WeightGradient, main_grad_of


@dataclass(frozen=True)
class Problem:
    """One call on this rank: rows [rows, H], weight [V_shard, H], labels [rows] global ids.

    inv_temperature: float, or [rows] in the accumulation dtype.
    """

    rows: GatheredRows
    weight: torch.Tensor
    labels: torch.Tensor
    inv_temperature: float | torch.Tensor
    shard: Shard
    with_entropy: bool


@dataclass(frozen=True)
class Upstream:
    """What the backward knows per row, [rows] in the accumulation dtype; gradients are 0 without label."""

    lse: torch.Tensor
    entropy: torch.Tensor | None
    grad_logprobs: torch.Tensor
    grad_entropy: torch.Tensor | None


class HiddenGradient:
    """dX [rows, H] in the making: summed in the accumulation dtype, reduced over the group behind our back."""

    def __init__(self, rows: GatheredRows, group: dist.ProcessGroup | None, scatter: bool) -> None:
        self._dtype = rows.like.dtype
        shape = (len(rows), rows.like.shape[1])
        self._sum = torch.zeros(shape, dtype=accumulation_dtype(rows.like), device=rows.like.device)
        self._group, self._scatter, self._empty = group, scatter, True
        self._reduction: tuple[torch.Tensor, dist.Work | None] | None = None

    def add(self, block: slice, grad_logits: torch.Tensor, weight: torch.Tensor) -> None:
        """Add grad_logits [block, columns] times weight [columns, H]."""
        add_mm_(self._sum[block], grad_logits, weight)

    def complete(self) -> None:
        """Nothing is added any more: start the all-reduce (or reduce-scatter). The caller may go on with dW."""
        if self._reduction is None:
            self._reduction = start_reduction(self._sum, self._group, scatter=self._scatter)

    def result(self) -> torch.Tensor:
        """The reduced gradient in the dtype of `hidden`."""
        self.complete()
        assert self._reduction is not None
        total, work = self._reduction
        if work is not None:
            work.wait()
        return total.to(self._dtype)


class Reducer(Protocol):
    """How tiles of logits are made and reduced."""

    def statistics(self, problem: Problem, *, for_backward: bool) -> tuple[Statistics, Any]:
        """This shard's statistics, and what the engine wants back in `gradients` (only if `for_backward`)."""


class Engine(Reducer, Protocol):
    """A `Reducer` that can also turn tiles of logits into gradients."""

    def gradients(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: Any,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """Add this shard's part of dX and dW. Calls hidden.complete() as soon as dX is, before the last of dW.

        Only called with at least one row and one column.
        """


@dataclass(frozen=True)
class Options:
    """What stays the same between forward and backward."""

    engine: Engine
    shard: Shard
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    with_entropy: bool
    for_backward: bool

    def problem(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: float | torch.Tensor,
    ) -> Problem:
        """The call's inputs with the gather of `hidden` under way."""
        rows = GatheredRows(hidden, self.tp_group if self.sequence_parallel else None)
        return Problem(rows, weight, labels, inv_temperature, self.shard, self.with_entropy)


class LinearLogProb(torch.autograd.Function):
    """hidden, weight -> (logprobs, entropy or None), each [rows]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: float | torch.Tensor,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        problem = options.problem(hidden, weight, labels, inv_temperature)
        local, kept = options.engine.statistics(problem, for_backward=options.for_backward)
        logprobs, entropy, lse = finish(reduced(local, options.tp_group), labels, options.shard)
        # The shard is kept, not the gathered rows: the backward gathers again.
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.inv_temperature, ctx.options, ctx.kept = inv_temperature, options, kept
        # The parameter's own attributes: what save_for_backward gives back need not be the same object.
        ctx.parameter = weight
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        options: Options = ctx.options
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        problem = options.problem(hidden, weight, labels, ctx.inv_temperature)
        known = has_label(labels, options.shard)
        grad_logprobs, grad_entropy = (None if grad is None else grad.where(known, 0) for grad in grads)
        upstream = Upstream(
            lse, entropy, torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs, grad_entropy
        )
        grad_hidden = grad_weight = None
        if need_hidden:
            grad_hidden = HiddenGradient(problem.rows, options.tp_group, options.sequence_parallel)
        if need_weight:
            grad_weight = WeightGradient(weight, main_grad_of(ctx.parameter), options.shard.columns)
        if options.shard.columns and len(problem.rows):
            options.engine.gradients(problem, upstream, ctx.kept, grad_hidden, grad_weight)
        else:
            problem.rows.all()
            if grad_weight is not None:
                grad_weight.clear()
        return (
            None if grad_hidden is None else grad_hidden.result(),
            None if grad_weight is None else grad_weight.for_autograd(ctx.parameter),
            None,
            None,
            None,
        )


def apply(
    engine: Engine,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    inv_temperature: float | torch.Tensor,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    with_entropy: bool,
) -> LogProbs:
    """`megatron_laser.ops.linear_logprob` for checked arguments, with `engine`."""
    if isinstance(inv_temperature, torch.Tensor):
        inv_temperature = inv_temperature.to(accumulation_dtype(hidden)).contiguous()
    shard = vocabulary_shard(weight, vocab_size, tp_group)
    # Inside the function gradients are always off, so whether there will be a backward is asked here.
    for_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = Options(engine, shard, tp_group, sequence_parallel, with_entropy, for_backward)
    # Kernels walk over per-row tensors without strides.
    return LogProbs(*LinearLogProb.apply(hidden, weight, labels.contiguous(), inv_temperature, options))

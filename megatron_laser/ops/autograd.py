"""The log-prob op around any engine: statistics per row, reduced over the group; upstream gradients, dX and dW.

The gradient of a row's unscaled logits z, with p = exp(z / T - lse), the entropy E, and g and e the gradients of
logprob and E, both divided by the temperature T, is

    dz_j = g [j = label] - p_j (g + e (log p_j + E))

Three products are the least for a forward and a backward together: the logits, dX = dz W and dW = dz^T X. A fourth one,
the logits again, is what probabilities kept from the forward save (`kept.py`). Rows whose g and e are exactly 0 have no
dz and take no part in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_laser.ops.collectives import GatheredRows, start_reduction
from megatron_laser.ops.kept import Kept
from megatron_laser.ops.statistics import Finished, Statistics, finish, reduced
from megatron_laser.ops.tiles import Shard, accumulation_dtype, add_mm_, has_label, mm
from megatron_laser.ops.weight_gradient import WeightGradient, main_grad_of

# The backward leaves rows without gradient out when there are more than this share of them: what is left of kept
# probabilities is copied, 4 bytes of traffic for each, against 4 H operations for each that is saved.
LEFT_OUT_FROM = 1 / 16


@dataclass(frozen=True)
class Problem:
    """One call on this rank: rows [rows, H], weight [V_shard, H], labels [rows] global ids.

    inv_temperature: float, or [rows] in the accumulation dtype. keep_bytes: what `statistics` may keep for the
    backward.
    """

    rows: GatheredRows
    weight: torch.Tensor
    labels: torch.Tensor
    inv_temperature: float | torch.Tensor
    shard: Shard
    with_entropy: bool
    keep_bytes: int = 0

    def at(self, chosen: torch.Tensor | slice) -> Problem:
        """The rows at `chosen`, an index [m] or a slice, alone."""
        inv_temperature = self.inv_temperature
        if isinstance(inv_temperature, torch.Tensor):
            inv_temperature = inv_temperature[chosen]
        return replace(
            self,
            rows=GatheredRows(self.rows.all()[chosen], None),
            labels=self.labels[chosen],
            inv_temperature=inv_temperature,
        )


@dataclass(frozen=True)
class Upstream:
    """What the backward knows per row, [rows] in the accumulation dtype; gradients are 0 without label.

    logprobs: the forward's. grad_entropy: None where the entropy has no gradient.
    """

    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    grad_logprobs: torch.Tensor
    grad_entropy: torch.Tensor | None

    @classmethod
    def of(
        cls,
        found: Finished,
        known: torch.Tensor,
        grad_logprobs: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
    ) -> Upstream:
        """From gradients [rows] or None of both outputs; `known` [rows]: the row has a label."""
        return cls(
            found.logprobs,
            found.lse,
            found.entropy,
            torch.zeros_like(found.lse) if grad_logprobs is None else grad_logprobs.where(known, 0),
            None if grad_entropy is None or found.entropy is None else grad_entropy.where(known, 0),
        )

    def active(self) -> torch.Tensor:
        """[rows] bool: a gradient is not exactly 0 (NaN is none)."""
        active = self.grad_logprobs != 0
        return active if self.grad_entropy is None else active | (self.grad_entropy != 0)

    def label_gradient(self, inv_temperature: torch.Tensor) -> torch.Tensor:
        """dz [rows] of each row's label."""
        gradient = self.grad_logprobs * self.logprobs.expm1().neg_()
        if self.grad_entropy is not None and self.entropy is not None:
            gradient -= self.grad_entropy * self.logprobs.exp() * (self.logprobs + self.entropy)
        return gradient * inv_temperature

    def at(self, chosen: torch.Tensor | slice) -> Upstream:
        """The rows at `chosen`, an index [m] or a slice, alone."""
        return Upstream(
            self.logprobs[chosen],
            self.lse[chosen],
            None if self.entropy is None else self.entropy[chosen],
            self.grad_logprobs[chosen],
            None if self.grad_entropy is None else self.grad_entropy[chosen],
        )


class HiddenGradient:
    """dX [rows, H] of one `gradients` call in the making, in the accumulation dtype."""

    def __init__(self, rows: int, like: torch.Tensor, completed: Callable[[torch.Tensor], None]) -> None:
        """`completed` is called once with the finished sum, as early as possible."""
        self._shape = (rows, like.shape[1])
        self._dtype, self._device = accumulation_dtype(like), like.device
        self._completed = completed
        self._sum: torch.Tensor | None = None
        self._told = False

    def add(self, block: slice, grad_logits: torch.Tensor, weight: torch.Tensor) -> None:
        """Add grad_logits [block, columns] times weight [columns, H]."""
        if self._sum is None:
            if block.stop - block.start == self._shape[0]:
                # The first product writes the sum: nothing is cleared and read.
                self._sum = torch.empty(self._shape, dtype=self._dtype, device=self._device)
                mm(grad_logits, weight, out=self._sum)
                return
            self._sum = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        add_mm_(self._sum[block], grad_logits, weight)

    def scale_rows_(self, factor: torch.Tensor) -> None:
        """Multiply what was added so far by factor [rows]."""
        if self._sum is not None:
            self._sum.mul_(factor.unsqueeze(1))

    def complete(self) -> None:
        """Nothing is added any more. The caller may go on with dW."""
        if not self._told:
            self._told = True
            total = self._sum
            if total is None:
                total = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
            self._sum = None
            self._completed(total)


class Placed(Protocol):
    """Where rows came from; see `linear_logprob`."""

    @property
    def tp_group(self) -> dist.ProcessGroup | None: ...
    @property
    def sequence_parallel(self) -> bool: ...
    @property
    def distinct_rows(self) -> bool: ...


class TokenGradient:
    """dX of rows as the gradient of `hidden`: put where the rows came from and reduced over the group."""

    def __init__(self, rows: GatheredRows, options: Placed) -> None:
        self._rows, self._options = rows, options
        self._started: tuple[torch.Tensor, dist.Work | None] | None = None

    def start(self, total: torch.Tensor, chosen: torch.Tensor | None) -> None:
        """Start the reduction of total [m, H], the gradient of the rows at `chosen` [m] (None: of all)."""
        positions = self._rows.positions(chosen)
        if positions is not None:
            tokens = total.new_zeros((self._rows.tokens, total.shape[1]))
            if self._options.distinct_rows:
                total = tokens.index_copy_(0, positions, total)
            else:
                # Positions may repeat; this sorts, so that every sum has a fixed order (index_add_ would not).
                total = tokens.index_put_((positions,), total, accumulate=True)
        options = self._options
        self._started = start_reduction(total, options.tp_group, scatter=options.sequence_parallel)

    def result(self) -> torch.Tensor:
        """The gradient of `hidden`, in its dtype."""
        assert self._started is not None
        total, work = self._started
        if work is not None:
            work.wait()
        return total.to(self._rows.like.dtype)


class Reducer(Protocol):
    """How tiles of logits are made and reduced."""

    def statistics(self, problem: Problem, *, for_backward: bool) -> tuple[Statistics, Kept | None]:
        """This shard's statistics, and what is kept for `gradients` (only if `for_backward`)."""


class Engine(Reducer, Protocol):
    """A `Reducer` that can also turn tiles of logits into gradients."""

    def kept_dtype(self, like: torch.Tensor) -> torch.dtype | None:
        """What probabilities of inputs like this are kept in; None: they are not."""

    def gradients(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: Kept | None,
        hidden: HiddenGradient | None,
        weight: WeightGradient | None,
    ) -> None:
        """Add this shard's part of dX and dW. Calls hidden.complete() as soon as dX is, before the last of dW.

        Takes `kept`, which may hold a part of the columns, apart. Only called with at least one row and one column.
        """


@dataclass(frozen=True)
class Options:
    """What stays the same between forward and backward."""

    engine: Engine
    shard: Shard
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    with_entropy: bool
    entropy_gradient: bool
    own_rows: tuple[int, int] | None
    distinct_rows: bool
    keep_bytes: int
    for_backward: bool

    def gather(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> GatheredRows:
        """The call's rows, with the gather of `hidden` under way."""
        return GatheredRows(hidden, self.tp_group if self.sequence_parallel else None, rows, self.own_rows)

    def problem(
        self,
        rows: GatheredRows,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: float | torch.Tensor,
    ) -> Problem:
        """What an engine is given."""
        return Problem(rows, weight, labels, inv_temperature, self.shard, self.with_entropy, self.keep_bytes)

    def forward(self, problem: Problem) -> tuple[Finished, Kept | None]:
        """Outputs of a problem, and what is kept for `backward`."""
        local, kept = self.engine.statistics(problem, for_backward=self.for_backward)
        found = finish(reduced(local, self.tp_group), problem.labels, self.shard)
        if kept is not None:
            kept.compare(found.lse)
        return found, kept

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        kept: Kept | None,
        hidden: Callable[[torch.Tensor, torch.Tensor | None], None] | None,
        weight: WeightGradient | None,
    ) -> None:
        """Gradients of a problem; `hidden` is given dX [m, H] of the rows at an index [m], or of all (None)."""
        rows = len(problem.rows)
        chosen: torch.Tensor | None = None
        if rows and self.shard.columns:
            active = upstream.active()
            # One wait for the device answers both questions.
            questions = [active.sum(dtype=torch.float64)]
            if kept is not None:
                questions.append(kept.largest_shift.double())
            count, *shift = torch.stack(questions).tolist()
            if kept is not None and not kept.holds(shift[0]):
                kept.release()
                kept = None
            if rows - count > rows * LEFT_OUT_FROM:
                chosen = active.nonzero().squeeze(1)
                problem, upstream = problem.at(chosen), upstream.at(chosen)
                if kept is not None:
                    kept.choose(chosen)
                rows = len(chosen)
        part = None
        if hidden is not None:
            part = HiddenGradient(rows, problem.rows.like, lambda total: hidden(total, chosen))
        if rows and self.shard.columns:
            self.engine.gradients(problem, upstream, kept, part, weight)
        else:
            if kept is not None:
                kept.release()
            if weight is not None:
                weight.clear()
        problem.rows.all()  # a gather that nobody needed ends here
        if part is not None:
            part.complete()


class LinearLogProb(torch.autograd.Function):
    """hidden, weight -> (logprobs, entropy or None), each [rows]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None,
        inv_temperature: float | torch.Tensor,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See the class."""
        problem = options.problem(options.gather(hidden, rows), weight, labels, inv_temperature)
        found, kept = options.forward(problem)
        # The shard is kept, not the gathered rows: the backward gathers again.
        ctx.save_for_backward(hidden, weight, labels, rows, found.logprobs, found.lse, found.entropy)
        ctx.inv_temperature, ctx.options, ctx.kept = inv_temperature, options, kept
        # The parameter's own attributes: what save_for_backward gives back need not be the same object.
        ctx.parameter = weight
        ctx.set_materialize_grads(False)
        if found.entropy is not None and not options.entropy_gradient:
            ctx.mark_non_differentiable(found.entropy)
        return found.logprobs, found.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """See the class."""
        hidden, weight, labels, rows, logprobs, lse, entropy = ctx.saved_tensors
        options: Options = ctx.options
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # Taken out of the graph, which may live as long as the loss does: each tile goes when it was used. A second
        # backward through the same graph recomputes.
        kept, ctx.kept = ctx.kept, None
        problem = options.problem(options.gather(hidden, rows), weight, labels, ctx.inv_temperature)
        upstream = Upstream.of(Finished(logprobs, entropy, lse), has_label(labels, options.shard), *grads)
        tokens = grad_weight = None
        if need_hidden:
            tokens = TokenGradient(problem.rows, options)
        if need_weight:
            grad_weight = WeightGradient(weight, main_grad_of(ctx.parameter), options.shard.columns)
        options.backward(problem, upstream, kept, None if tokens is None else tokens.start, grad_weight)
        return (
            None if tokens is None else tokens.result(),
            None if grad_weight is None else grad_weight.for_autograd(ctx.parameter),
            None,
            None,
            None,
            None,
        )

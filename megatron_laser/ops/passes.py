"""The two ways a call with a gradient can go: two passes over all rows, or blocks of rows with the loss inside.

Two passes: the forward may keep probabilities (2 bytes for each row and column of the shard) for the backward. With
room for all of them, forward and backward are three products; each that is not kept is multiplied again.

Blocks of rows: where not all fit, but the caller hands in its loss, each block is finished before the next one begins:
statistics, log-probs, the loss's gradient of these rows, dX and dW, from one block's probabilities. Three products
again, and the memory of one block. The log-probs that come back carry the finished gradient: the caller computes its
loss from them as ever, and its backward only compares the gradient that arrives with the one that was used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_laser.ops.autograd import Engine, LinearLogProb, Options, TokenGradient, Upstream
from megatron_laser.ops.collectives import group_size
from megatron_laser.ops.device import multiprocessors
from megatron_laser.ops.memory import agreed_keep_budget, keep_budget
from megatron_laser.ops.settings import settings
from megatron_laser.ops.slices import row_blocks
from megatron_laser.ops.tiles import accumulation_dtype, has_label, padded, vocabulary_shard
from megatron_laser.ops.types import LogProbs
from megatron_laser.ops.weight_gradient import WeightGradient, main_grad_of

#: (logprobs [m], entropy [m] or None, which of the rows) -> their part of the loss, a scalar; a sum over rows.
RowLoss = Callable[[torch.Tensor, "torch.Tensor | None", slice], torch.Tensor]


def apply(
    engine: Engine,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    own_rows: tuple[int, int] | None = None,
    distinct_rows: bool = False,
    inv_temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    loss: RowLoss | None = None,
) -> LogProbs:
    """`megatron_laser.ops.linear_logprob` for checked arguments, with `engine`."""
    if isinstance(inv_temperature, torch.Tensor):
        inv_temperature = inv_temperature.to(accumulation_dtype(hidden)).contiguous()
    # Inside a function gradients are always off, so whether there will be a backward is asked here.
    for_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = Options(
        engine,
        vocabulary_shard(weight, vocab_size, tp_group),
        tp_group,
        sequence_parallel,
        with_entropy,
        entropy_gradient and with_entropy,
        own_rows,
        distinct_rows or rows is None,
        keep_budget(hidden.device, tp_group) if for_backward else 0,
        for_backward,
    )
    # Kernels walk over per-row tensors without strides.
    labels = labels.contiguous()
    inputs = (hidden, weight, labels, rows, inv_temperature, options)
    if loss is not None and for_backward and len(labels):
        blocks = blocks_of_rows(
            *(len(labels), hidden.shape[1], weight.shape[0]),
            kept=engine.kept_dtype(hidden),
            budget=agreed_keep_budget(hidden.device, tp_group),
            multiprocessors=multiprocessors(hidden.device),
        )
        if len(blocks) > 1:
            return LogProbs(*LossInBlocks.apply(*inputs, loss, blocks))
    return LogProbs(*LinearLogProb.apply(*inputs))


def blocks_of_rows(
    rows: int,
    hidden_size: int,
    columns: int,
    *,
    kept: torch.dtype | None,
    budget: int,
    multiprocessors: int,
) -> list[int]:
    """Rows of each block; a single one means two passes.

    That is where all probabilities fit into `budget` bytes, and where those of so few rows do that the products would
    be small and dW would be read and written too often. The same on all ranks of a tensor-parallel group if `budget`
    is, with `columns` those of the padded shard.
    """
    if kept is None:
        return [rows]
    most = budget // (padded(columns) * kept.itemsize)
    if most >= rows or most < settings().min_block_rows:
        return [rows]
    return row_blocks(rows, hidden_size, columns, most=most, multiprocessors=multiprocessors)


class LossInBlocks(torch.autograd.Function):
    """hidden, weight -> (logprobs, entropy or None), each [rows], with dX and dW made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None,
        inv_temperature: float | torch.Tensor,
        options: Options,
        loss: RowLoss,
        blocks: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See the class."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        everything = options.gather(hidden, rows)
        inputs, count, dtype = everything.all(), len(labels), accumulation_dtype(hidden)
        results = inputs.new_empty((2 if options.with_entropy else 1, count), dtype=dtype)
        grads = torch.zeros_like(results)
        grad_weight = total = None
        if need_weight:
            grad_weight = WeightGradient(
                weight, main_grad_of(weight), options.shard.columns, several_passes=True
            )
        if need_hidden:
            # Over a group, and where a row is there twice, these are added up, which wants all digits.
            summed = group_size(options.tp_group) > 1 or not options.distinct_rows
            total = inputs.new_zeros(inputs.shape, dtype=dtype if summed else inputs.dtype)
        whole = options.problem(everything, weight, labels, inv_temperature)
        ends = itertools.accumulate(blocks)
        for block in (slice(end - size, end) for size, end in zip(blocks, ends, strict=True)):
            problem = whole.at(block)
            found, kept = options.forward(problem)
            results[0, block] = found.logprobs
            if found.entropy is not None:
                results[1, block] = found.entropy
            one = _gradients_of(loss, found.logprobs, found.entropy, block, options.entropy_gradient)
            grads[0, block] = one[0]
            if one[1] is not None:
                grads[1, block] = one[1]
            upstream = Upstream.of(found, has_label(labels[block], options.shard), *one)

            def put(part: torch.Tensor, chosen: torch.Tensor | None, block: slice = block) -> None:
                assert total is not None
                if chosen is None:
                    total[block] = part
                else:
                    total[block].index_copy_(0, chosen, part.to(total.dtype))

            options.backward(problem, upstream, kept, put if need_hidden else None, grad_weight)
        ctx.tokens = None
        if total is not None:
            ctx.tokens = TokenGradient(everything, options)
            ctx.tokens.start(total, None)
        ctx.save_for_backward(grads)
        ctx.grad_weight, ctx.parameter = grad_weight, weight
        ctx.set_materialize_grads(False)
        entropy = results[1] if options.with_entropy else None
        if entropy is not None and not options.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return results[0], entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arrived: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """See the class."""
        (used,) = ctx.saved_tensors
        _compare(used, arrived)
        if ctx.tokens is None and ctx.grad_weight is None:
            raise RuntimeError("the gradient of log-probs with the loss inside was made once, and is used up")
        tokens, grad_weight, ctx.tokens, ctx.grad_weight = ctx.tokens, ctx.grad_weight, None, None
        return (
            None if tokens is None else tokens.result(),
            None if grad_weight is None else grad_weight.for_autograd(ctx.parameter),
            *[None] * 6,
        )


def _gradients_of(
    loss: RowLoss,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    block: slice,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the loss of one block with respect to both outputs."""
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        wanted = [logprobs]
        if entropy is not None:
            entropy = entropy.detach().requires_grad_(entropy_gradient)
            if entropy_gradient:
                wanted.append(entropy)
        value = loss(logprobs, entropy, block)
        if not value.requires_grad:
            return torch.zeros_like(logprobs), None
        found = torch.autograd.grad(value, wanted, allow_unused=True)
    grad_logprobs = torch.zeros_like(logprobs) if found[0] is None else found[0]
    return grad_logprobs, found[1] if len(found) > 1 else None


def _compare(used: torch.Tensor, arrived: tuple[torch.Tensor | None, ...]) -> None:
    """Raise RuntimeError unless the gradients [rows] that arrive are those that dX and dW were made with."""
    off, largest = [], []
    for index, grad in enumerate(arrived):
        if index < len(used):
            other = torch.zeros_like(used[index]) if grad is None else grad
            off.append((other - used[index]).abs().amax() if len(other) else other.sum())
            largest.append(used[index].abs().amax() if len(other) else other.sum())
    difference, size = torch.stack([torch.stack(off).amax(), torch.stack(largest).amax()]).tolist()
    # NaN is let through: it is in dX and dW as well, and whoever skips bad steps will see it there.
    if difference > 1e-5 * size:
        raise RuntimeError(
            f"linear_logprob(loss=...): the gradient of the log-probs that arrives differs from that of the loss that "
            f"was handed in by {difference:.3g}, of at most {size:.3g}. The backward must be of the same loss, with "
            "the factor 1: no loss scaling, no division by micro-batches after the op."
        )

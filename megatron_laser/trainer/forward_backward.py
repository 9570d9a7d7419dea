"""Micro-batches through Megatron's schedules: passes without gradients, and optimizer steps.

All ranks take or skip an optimizer step together: a bad number never reaches weights or Adam's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_laser.model.policy_model import HeadInputs
from megatron_laser.ops import RowLoss
from megatron_laser.trainer.micro_batch import MicroBatch
from megatron_laser.trainer.policy import Chunks, Policy


class LossFunction(Protocol):
    """The loss of a micro-batch: of all labelled rows, and of any block of them.

    terms: names of sums that say why a step is bad, the same on every rank.
    """

    terms: tuple[str, ...]

    def __call__(
        self, micro_batch: MicroBatch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Output [1 or 2, rows] of the head -> (scalar loss, named float64 sums)."""

    def row_loss(self, micro_batch: MicroBatch) -> RowLoss | None:
        """The same loss without the sums, in parts: its gradients are those of the whole. None: it has no parts."""


TOTAL, NORM = "total_loss", "grad_norm"


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step of a rollout batch.

    epoch, minibatch: from 0. bad: what was not finite, the same on every rank; not empty when the step was
    skipped. entries: this rank's named sums, one dict for each micro-batch; empty but on the last pipeline
    stage.
    """

    epoch: int
    minibatch: int
    grad_norm: float
    bad: tuple[str, ...]
    entries: list[dict[str, torch.Tensor]]


@torch.no_grad()
def run_forward(
    chunks: Chunks,
    micro_batches: Sequence[MicroBatch],
    head: Callable[[MicroBatch], HeadInputs] = lambda micro_batch: micro_batch.head,
) -> list[torch.Tensor]:
    """No-gradient pass: the head's output [1 or 2, rows] per micro-batch on the last stage, else []."""

    def step(iterator: Any, model: Any) -> Any:
        micro_batch = next(iterator)

        def collect(output: torch.Tensor) -> Any:
            zero = torch.zeros((), dtype=torch.int, device=output.device)
            return output.sum() * 0.0, zero, {"output": output}

        return _call(model, micro_batch, head(micro_batch)), collect

    return [entry["output"] for entry in _run(chunks, micro_batches, step, forward_only=True)]


def optimizer_step(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    loss: LossFunction,
    *,
    epoch: int,
    minibatch: int,
    group: dist.ProcessGroup | None,
) -> OptimizerStep:
    """Forward, backward and, if every rank found finite numbers, the optimizer step.

    The learning-rate schedule counts a skipped step too: it follows the run's plan.

    Args:
        group: all ranks over gloo; None on one process.
    """
    for module in policy.chunks.wrapped:
        module.zero_grad_buffer()
    policy.optimizer.zero_grad()
    entries = run_forward_backward(policy.chunks, micro_batches, loss)
    policy.scheduler.step(increment=1)
    # Megatron's step clips and applies in one call. Its first half, called alone, only points the main
    # gradients at the reduced buffers; `step` does the same again, so nothing is lost and nothing touched.
    policy.optimizer.prepare_grads()
    norm = float(policy.optimizer.get_grad_norm())
    # A step is skipped when one of the last two is not finite; the others say why.
    looked_at = (*loss.terms, TOTAL, NORM)
    bad = _agree(looked_at, _not_finite(looked_at[:-1], entries, norm), group)
    if TOTAL in bad or NORM in bad:
        return OptimizerStep(epoch, minibatch, norm, bad, entries)
    with policy.optimizer_on_device():
        policy.optimizer.step()
    return OptimizerStep(epoch, minibatch, norm, (), entries)


def run_forward_backward(
    chunks: Chunks, micro_batches: Sequence[MicroBatch], loss_function: LossFunction
) -> list[dict[str, torch.Tensor]]:
    """Forward and backward over all micro-batches of one optimizer step.

    Returns one dict of detached sums per micro-batch on the last pipeline stage, an empty list elsewhere.
    """

    def step(iterator: Any, model: Any) -> Any:
        micro_batch = next(iterator)

        def loss(output: torch.Tensor) -> Any:
            value, sums = loss_function(micro_batch, output)
            # A zero count: the loss is complete, nothing is divided by Megatron.
            return value, torch.zeros((), dtype=torch.int, device=output.device), sums

        # Megatron hands the loss's gradient on as it is: nothing is divided (a zero count, `calculate_per_token_loss`)
        # and the scale of losses is 1 without fp16. So the head may work with `row_loss`'s gradients already.
        head = replace(micro_batch.head, loss=loss_function.row_loss(micro_batch))
        return _call(model, micro_batch, head), loss

    return _run(chunks, micro_batches, step, forward_only=False)


def _run(
    chunks: Chunks, micro_batches: Sequence[MicroBatch], step: Callable[..., Any], *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    several = len(chunks.wrapped) > 1
    entries = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks.wrapped] if several else iter(micro_batches),
        model=chunks.wrapped if several else chunks.wrapped[0],
        num_microbatches=len(micro_batches),
        seq_length=max(micro_batch.tokens.shape[1] for micro_batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    for model in chunks.models:
        # What the stage before has sent last, with its gradient: nobody reads it again, and the schedule leaves it.
        model.set_input_tensor(None)
    return entries


def _call(model: Any, micro_batch: MicroBatch, head: HeadInputs) -> torch.Tensor:
    return model(
        input_ids=micro_batch.tokens,
        position_ids=micro_batch.position_ids,
        attention_mask=None,
        packed_seq_params=micro_batch.packed,
        head_inputs=head,
    )


def _not_finite(names: Sequence[str], entries: Sequence[dict[str, torch.Tensor]], norm: float) -> list[bool]:
    """Of the sum of each of `names`, and of the norm."""
    sums = [sum(float(entry[name]) for entry in entries if name in entry) for name in names]
    return [not math.isfinite(value) for value in (*sums, norm)]


def _agree(names: Sequence[str], flags: list[bool], group: dist.ProcessGroup | None) -> tuple[str, ...]:
    """The names whose flag is set on any rank."""
    if group is not None:
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        flags = [bool(flag) for flag in found.tolist()]
    return tuple(name for name, flag in zip(names, flags, strict=True) if flag)

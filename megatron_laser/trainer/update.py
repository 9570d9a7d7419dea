"""One optimizer step that all ranks take or skip together: a bad number never reaches weights or Adam's state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_laser.trainer.forward import LossFunction, run_forward_backward
from megatron_laser.trainer.micro_batch import MicroBatch
from megatron_laser.trainer.policy import Policy

TOTAL, NORM = "total_loss", "grad_norm"
#: What is looked at; a step is skipped when TOTAL or NORM is not finite, the others say why.
TERMS = ("policy_loss", "self_reward_loss", "self_reward_error", "kl_loss", "entropy", TOTAL, NORM)


@dataclass(frozen=True)
class Update:
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


def update(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    loss: LossFunction,
    *,
    epoch: int,
    minibatch: int,
    group: dist.ProcessGroup | None,
) -> Update:
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
    bad = _agree(_not_finite(entries, norm), group)
    if TOTAL in bad or NORM in bad:
        return Update(epoch, minibatch, norm, bad, entries)
    policy.optimizer.step()
    return Update(epoch, minibatch, norm, (), entries)


def _not_finite(entries: Sequence[dict[str, torch.Tensor]], norm: float) -> list[bool]:
    sums = {name: sum(float(entry[name]) for entry in entries if name in entry) for name in TERMS[:-1]}
    return [not math.isfinite(value) for value in (*sums.values(), norm)]


def _agree(flags: list[bool], group: dist.ProcessGroup | None) -> tuple[str, ...]:
    """The terms that are bad on any rank."""
    if group is not None:
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        flags = [bool(flag) for flag in found.tolist()]
    return tuple(name for name, flag in zip(TERMS, flags, strict=True) if flag)

"""Running micro-batches through Megatron's schedules, with and without a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_laser.model.policy_model import HeadInputs
from megatron_laser.trainer.micro_batch import MicroBatch
from megatron_laser.trainer.policy import Chunks

# output [1 or 2, rows] of the head -> (scalar loss, named float64 sums)
LossFunction = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


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

        return _call(model, micro_batch, micro_batch.head), loss

    return _run(chunks, micro_batches, step, forward_only=False)


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


def _call(model: Any, micro_batch: MicroBatch, head: HeadInputs) -> torch.Tensor:
    return model(
        input_ids=micro_batch.tokens,
        position_ids=micro_batch.position_ids,
        attention_mask=None,
        packed_seq_params=micro_batch.packed,
        head_inputs=head,
    )


def _run(
    chunks: Chunks, micro_batches: Sequence[MicroBatch], step: Callable[..., Any], *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    several = len(chunks.wrapped) > 1
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks.wrapped] if several else iter(micro_batches),
        model=chunks.wrapped if several else chunks.wrapped[0],
        num_microbatches=len(micro_batches),
        seq_length=max(micro_batch.tokens.shape[1] for micro_batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )

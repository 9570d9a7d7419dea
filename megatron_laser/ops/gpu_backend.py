"""The log-prob op on CUDA: the implementation that the dispatcher chooses, and the two public calls with it."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from megatron_laser.ops.autograd import Engine, Reducer, apply, without_gradient
from megatron_laser.ops.collectives import group_size
from megatron_laser.ops.cuda import few_rows as cuda_few_rows
from megatron_laser.ops.device import tma_refuses
from megatron_laser.ops.dispatch import Choice, Shape, choose_few_rows, choose_forward
from megatron_laser.ops.tiles import vocabulary_shard
from megatron_laser.ops.triton.engine import ChunkedEngine
from megatron_laser.ops.triton.few_rows import FewRowEngine
from megatron_laser.ops.triton.fused import FusedEngine
from megatron_laser.ops.types import LogProbs

log = logging.getLogger(__name__)

FORWARD_ENGINES: dict[str, type[ChunkedEngine]] = {"chunked": ChunkedEngine, "fused": FusedEngine}
FEW_ROW_ENGINES: dict[str, type[Reducer]] = {
    **FORWARD_ENGINES,
    "few_rows": FewRowEngine,
    "cuda": cuda_few_rows.CudaFewRowEngine,
}
_said: set[Choice] = set()


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    inv_temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    with_entropy: bool = False,
    engine: Engine | None = None,
) -> LogProbs:
    """`megatron_laser.ops.linear_logprob` for checked arguments; `engine`: instead of the dispatcher's choice."""
    hidden = hidden.contiguous()
    if engine is None:
        gathered = group_size(tp_group) if sequence_parallel else 1
        columns = vocabulary_shard(weight, vocab_size, tp_group).columns
        engine = FORWARD_ENGINES[forward_choice(hidden, weight, gathered, columns).name]()
    return apply(
        engine,
        hidden,
        weight,
        labels,
        inv_temperature=inv_temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        with_entropy=with_entropy,
    )


def few_row_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    engine: Reducer | None = None,
) -> torch.Tensor:
    """`megatron_laser.ops.few_row_logprob` for checked arguments; `engine`: instead of the dispatcher's choice."""
    hidden = hidden.contiguous()
    if engine is None:
        columns = vocabulary_shard(weight, vocab_size, tp_group).columns
        engine = FEW_ROW_ENGINES[few_row_choice(hidden, weight, columns).name]()
    return without_gradient(engine, hidden, weight, labels, vocab_size=vocab_size, tp_group=tp_group)


def forward_choice(hidden: torch.Tensor, weight: torch.Tensor, gathered: int, columns: int) -> Choice:
    """What `linear_logprob` uses for these inputs (`gathered` ranks' rows), logged once for each answer."""
    shape = Shape(hidden.shape[0] * gathered, hidden.shape[1], columns)
    return _say("linear_logprob", choose_forward(shape, tma_refuses=tma_refuses(hidden, weight)))


def few_row_choice(hidden: torch.Tensor, weight: torch.Tensor, columns: int) -> Choice:
    """What `few_row_logprob` uses for these inputs, logged once for each answer."""
    shape = Shape(hidden.shape[0], hidden.shape[1], columns)
    # Looked for only where it could be chosen: the first look builds the kernel.
    tma = tma_refuses(hidden, weight)
    possible = tma is None and 0 < shape.rows <= cuda_few_rows.MAX_ROWS
    cuda = cuda_few_rows.refuses(hidden, weight) if possible else None
    return _say("few_row_logprob", choose_few_rows(shape, tma_refuses=tma, cuda_refuses=cuda))


def _say(call: str, choice: Choice) -> Choice:
    if choice not in _said:
        _said.add(choice)
        log.info("%s uses %s: %s", call, choice.name, choice.reason)
    return choice

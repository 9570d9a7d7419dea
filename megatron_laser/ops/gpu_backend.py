"""The log-prob op on CUDA: the implementation that the dispatcher chooses, and the two public calls with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_laser.ops.autograd import Engine
from megatron_laser.ops.collectives import all_gather, group_rank, group_size
from megatron_laser.ops.cuda import few_rows as cuda_few_rows
from megatron_laser.ops.device import tma_refuses
from megatron_laser.ops.dispatch import Choice, Shape, choose_few_rows, choose_forward
from megatron_laser.ops.few_rows import NOTHING, FewRowReducer, FewRows, StatisticsOf, chosen_rows
from megatron_laser.ops.passes import apply
from megatron_laser.ops.statistics import no_columns
from megatron_laser.ops.tiles import accumulation_dtype, vocabulary_shard
from megatron_laser.ops.triton.engine import ChunkedEngine
from megatron_laser.ops.triton.few_rows import FewRowEngine
from megatron_laser.ops.triton.fused import FusedEngine
from megatron_laser.ops.triton.merge import finish, merge, pick
from megatron_laser.ops.types import LogProbs

log = logging.getLogger(__name__)

FORWARD_ENGINES: dict[str, type[ChunkedEngine]] = {"chunked": ChunkedEngine, "fused": FusedEngine}
FEW_ROW_ENGINES: dict[str, Callable[[], FewRowReducer]] = {
    "chunked": lambda: StatisticsOf(ChunkedEngine()),
    "fused": FusedEngine,
    "few_rows": FewRowEngine,
    "cuda": cuda_few_rows.CudaFewRowEngine,
}
_said: set[Choice] = set()


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    engine: Engine | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    **settings: Any,
) -> LogProbs:
    """`megatron_laser.ops.linear_logprob` for checked arguments; `engine`: instead of the dispatcher's choice."""
    hidden = hidden.contiguous()
    if engine is None:
        columns = vocabulary_shard(weight, vocab_size, tp_group).columns
        engine = FORWARD_ENGINES[forward_choice(hidden, weight, len(labels), columns).name]()
    return apply(engine, hidden, weight, labels, vocab_size=vocab_size, tp_group=tp_group, **settings)


def few_row_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    engine: FewRowReducer | None = None,
) -> torch.Tensor:
    """`megatron_laser.ops.few_row_logprob` for checked arguments; `engine`: instead of the dispatcher's choice.

    Two launches on one rank: the product with its partial results, and what finishes them. On several ranks each one's
    are merged first, and one all-gather brings them to all.
    """
    shard = vocabulary_shard(weight, vocab_size, tp_group)
    size = group_size(tp_group)
    if not sequence_parallel or size == 1 or rows is None:
        hidden = chosen_rows(hidden, rows, tp_group, sequence_parallel)
    elif labels.shape[0]:
        first, tokens = group_rank(tp_group) * hidden.shape[0], size * hidden.shape[0]
        hidden = pick(hidden.contiguous(), rows, first, tokens, NOTHING)
        dist.all_reduce(hidden, group=tp_group)
    if not labels.shape[0]:
        return torch.empty((0,), dtype=accumulation_dtype(hidden), device=hidden.device)
    labels = labels.contiguous()
    if shard.columns:
        if engine is None:
            engine = FEW_ROW_ENGINES[few_row_choice(hidden, weight, shard.columns).name]()
        partials = engine.partials(FewRows(hidden, weight, labels, shard))
    else:
        local = no_columns(labels.shape[0], accumulation_dtype(hidden), hidden.device, False)
        partials = torch.stack(local[:3]).unsqueeze(1)
    if size > 1:
        partials = all_gather(merge(partials), tp_group).transpose(0, 1)
    return finish(partials, labels, shard.vocab_size)


def forward_choice(hidden: torch.Tensor, weight: torch.Tensor, rows: int, columns: int) -> Choice:
    """What `linear_logprob` uses for `rows` labelled rows of these inputs, logged once for each answer."""
    shape = Shape(rows, hidden.shape[1], columns)
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

"""Other libraries' linear cross entropy as contenders; one that is not installed, or does not run here, raises.

Written for liger-kernel 0.8.5, quack-kernels 0.6.5, cut-cross-entropy 25.1.1. Those that give only a sum are asked for
the sum, whose upstream gradient is 1 for every row as in every other measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from megatron_laser.benchmarks.logprob_implementation import Implementation, Op, dense
from megatron_laser.ops import IGNORE_LABEL

# Rows of a chunk of the compiled version: their float32 logits of a vocabulary of 152064 are 1.2 GB.
_CHUNK_ROWS = 2048


def peers() -> list[Implementation]:
    """All of them, installed or not."""
    return [
        Implementation("torch.compile, chunks", compiled_chunks),
        Implementation("Liger: Triton, sum", liger_sum, only_sum=True, remark=_in_the_forward),
        Implementation("Liger: CuTe SM90, sum", liger_sm90_sum, only_sum=True, remark=_in_the_forward),
        Implementation("Liger: per token", liger_per_token),
        Implementation("quack, sum", quack_sum, only_sum=True, remark=_in_the_forward),
        Implementation("cut-cross-entropy", cut_cross_entropy),
    ]


def _in_the_forward(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    return "most of its backward runs in its forward"


def liger_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Chunks of rows, gradients in the forward; with its Triton kernel for the loss even where CuTe is installed."""
    from liger_kernel import backends
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    before = backends.get_impl()
    backends.set_impl("nvidia-triton")
    try:
        return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)
    finally:
        backends.set_impl(before)


def liger_sm90_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Its Hopper kernels in CuTe, which keep all logits in bf16: whole tiles of rows and columns only."""
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as sm90

    return -sm90.liger_fused_linear_cross_entropy_sm90(hidden, weight, labels, IGNORE_LABEL, "sum")


def liger_per_token(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One loss a row and one upstream gradient a row: CuTe on Hopper, chunks in torch elsewhere."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as scaled

    return -scaled.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, IGNORE_LABEL)


def quack_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Chunks of rows with gradients in the forward; exp(z - a power of two) kept in bf16 where the shape allows."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    settings = {"chunk_size": 4096, "ignore_index": IGNORE_LABEL, "reduction": "sum"}
    return -chunked_linear_cross_entropy(hidden, weight, labels, **settings)


def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Without its filter of small gradients, which is biased once tokens have different weights."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None)


def compiled_chunks(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Blocks of rows, each compiled as a whole, their logits made again in the backward."""
    return chunks(hidden, weight, labels, _compiled())


def chunks(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, block: Op, rows: int = _CHUNK_ROWS
) -> torch.Tensor:
    """`block` on every `rows` rows, with a checkpoint around it."""
    parts = zip(hidden.split(rows), labels.split(rows))
    return torch.cat([checkpoint(block, part, weight, some, use_reentrant=False) for part, some in parts])


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(dense, dynamic=False)

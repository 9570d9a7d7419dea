"""The log-prob op in plain torch: exact, deterministic, tiled so that the logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch

from megatron_laser.logprob_memory import CPU_TILE_BYTES
from megatron_laser.ops.autograd import Upstream
from megatron_laser.ops.few_rows import without_gradient
from megatron_laser.ops.kept import MARGIN, kept_dtype
from megatron_laser.ops.passes import apply
from megatron_laser.ops.statistics import Statistics
from megatron_laser.ops.tiled_engine import Keep, TiledEngine
from megatron_laser.ops.tiles import local_labels, mm_operand
from megatron_laser.ops.types import LogProbs

# Memory for one tile of logits, and on CUDA a half-precision copy of one; kept probabilities come in tiles of as much.
LOGITS_TILE_BYTES = CPU_TILE_BYTES
_MIN_COLUMNS = 64


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    tile_bytes: int = LOGITS_TILE_BYTES,
    **settings: Any,
) -> LogProbs:
    """`megatron_laser.ops.linear_logprob` for checked arguments; `tile_bytes` bounds one tile of logits."""
    return apply(TorchEngine(tile_bytes), hidden, weight, labels, **settings)


def few_row_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    tile_bytes: int = LOGITS_TILE_BYTES,
    **settings: Any,
) -> torch.Tensor:
    """`megatron_laser.ops.few_row_logprob` for checked arguments."""
    return without_gradient(TorchEngine(tile_bytes), hidden, weight, labels, **settings)


class TorchTiles:
    """`TileFunctions` in plain torch."""

    def kept_dtype(self, like: torch.Tensor) -> torch.dtype | None:
        """See `TileFunctions`: where operands are widened for the products (on a CPU), nothing has to be rounded."""
        return kept_dtype(mm_operand(like[:0]).dtype)

    def statistics(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        state: Statistics,
        first_column: int,
        keep: Keep | None,
    ) -> None:
        """See `TileFunctions`."""
        z.mul_(inv_temperature.unsqueeze(1))
        label, owned = local_labels(labels, first_column, z.shape[1])
        state.label_logit.add_(z.gather(1, label).squeeze(1).where(owned, 0))
        largest = z.amax(1)
        maximum = torch.maximum(state.maximum, largest)
        # A row of -inf so far has no sums to move: -inf - -inf is NaN.
        base = maximum.where(maximum > -torch.inf, 0)
        shift = (state.maximum - base).where(state.maximum > -torch.inf, 0)
        rescale = (state.maximum - base).exp()
        z.sub_(base.unsqueeze(1))
        if state.moment is None:
            p = z.exp_()
        else:
            p = z.exp()
            moment = z.mul_(p).masked_fill_(p == 0, 0).sum(1)  # 0 * -inf is NaN
            state.moment.add_(shift * state.total).mul_(rescale).add_(moment)
        state.total.mul_(rescale).add_(p.sum(1))
        state.maximum.copy_(maximum)
        if keep is not None:
            if keep.first:
                torch.add(base, MARGIN, out=keep.base)
            torch.mul(p, (base - keep.base).exp_().unsqueeze(1), out=keep.values)

    def gradient(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        upstream: Upstream,
        out: torch.Tensor,
        first_column: int,
        base: torch.Tensor | None,
    ) -> None:
        """See `TileFunctions`."""
        grad = upstream.grad_logprobs * inv_temperature
        if base is None:
            log_p = z.mul_(inv_temperature.unsqueeze(1)).sub_(upstream.lse.unsqueeze(1))
            p = log_p.exp() if upstream.grad_entropy is not None else log_p.exp_()
        else:
            p = z * (base - upstream.lse).exp_().unsqueeze(1)
            log_p = p.where(p > 0, 1).log() if upstream.grad_entropy is not None else p
        if upstream.grad_entropy is None or upstream.entropy is None:
            dz = p.mul_(grad.neg().unsqueeze(1))
        else:
            grad_entropy = upstream.grad_entropy * inv_temperature
            constant = grad + grad_entropy * upstream.entropy
            dz = log_p.mul_(grad_entropy.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(p).neg_()
        label, owned = local_labels(labels, first_column, dz.shape[1])
        dz.scatter_add_(1, label, grad.where(owned, 0).unsqueeze(1))
        if out.data_ptr() != dz.data_ptr():
            out.copy_(dz)


class TorchEngine(TiledEngine):
    """`TiledEngine` in plain torch; `tile_bytes` bounds a tile of logits, and one of kept probabilities."""

    def __init__(self, tile_bytes: int = LOGITS_TILE_BYTES) -> None:
        super().__init__(
            TorchTiles(), tile_bytes=tile_bytes, min_columns=_MIN_COLUMNS, kept_tile_bytes=tile_bytes
        )

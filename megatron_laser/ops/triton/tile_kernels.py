"""Triton kernels over one tile of logits in memory: statistics in one read, and the gradient of the logits.

Both are bound by memory. A program owns a row (statistics) or a piece of one (gradient), so every value has one
writer and the order of every sum is fixed: results are bitwise the same from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_laser.ops.autograd import Upstream
from megatron_laser.ops.kept import MARGIN, kept_dtype
from megatron_laser.ops.statistics import Statistics
from megatron_laser.ops.tiled_engine import Keep

# Columns that a program handles at a time. With 8 warps each thread holds 16 values: enough loads in flight to
# saturate memory, no spills.
BLOCK = 4096
WARPS = 8


@triton.jit
def tile_statistics(  # type: ignore[no-untyped-def]
    z,
    labels,
    inv_temperature,
    maximum,
    total,
    label_logit,
    moment,
    kept,
    kept_base,
    first_column,
    columns,
    z_stride,
    kept_stride,
    margin,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge one tile of unscaled logits into the running statistics; one program per row.

    z [rows, columns] (row stride z_stride), of the global columns from first_column on; labels [rows] int64 global;
    inv_temperature, maximum, total, label_logit, moment [rows] in z's dtype, the last four updated.
    KEEP: also write kept [rows, columns] = exp(scaled z - base), with base from kept_base [rows]; FIRST: this tile
    determines the bases, its maxima and the margin, and writes them; its second read comes from the cache.
    """
    row = tl.program_id(0)
    scale = tl.load(inv_temperature + row)
    m = tl.load(maximum + row)
    s = tl.load(total + row)
    t = tl.load(moment + row) if ENTROPY else s
    z_row = z + row.to(tl.int64) * z_stride
    label = tl.load(labels + row) - first_column
    if (label >= 0) & (label < columns):
        tl.store(label_logit + row, tl.load(z_row + label) * scale)
    if FIRST:
        largest = tl.full([], float("-inf"), m.dtype)
        for start in range(0, columns, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < columns
            a = tl.load(z_row + offsets, mask=inside, other=float("-inf")) * scale
            largest = tl.maximum(largest, tl.max(tl.where(inside, a, float("-inf")), 0))
        row_base = tl.where(largest == float("-inf"), 0.0, largest) + margin
        tl.store(kept_base + row, row_base)
    elif KEEP:
        row_base = tl.load(kept_base + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        a = tl.load(z_row + offsets, mask=inside, other=float("-inf")) * scale
        # 0 * -inf would be NaN; a scale is positive, but what is outside must not depend on that.
        a = tl.where(inside, a, float("-inf"))
        new_m = tl.maximum(m, tl.max(a, 0))
        # A row of -inf so far has no sums to move: -inf - -inf is NaN.
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        shift = tl.where(m == float("-inf"), 0.0, m - base)
        rescale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
        p = tl.exp(a - base)
        if ENTROPY:
            # p (a - m), and 0 where p is: 0 * -inf is NaN.
            t = (t + shift * s) * rescale + tl.sum(p * tl.where(p > 0, a - base, 0.0), 0)
        s = s * rescale + tl.sum(p, 0)
        m = new_m
        if KEEP:
            kept_row = kept + row.to(tl.int64) * kept_stride
            tl.store(kept_row + offsets, (p * tl.exp(base - row_base)).to(kept.dtype.element_ty), mask=inside)
    tl.store(maximum + row, m)
    tl.store(total + row, s)
    if ENTROPY:
        tl.store(moment + row, t)


@triton.jit
def tile_gradient(  # type: ignore[no-untyped-def]
    z,
    labels,
    inv_temperature,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    kept_base,
    out,
    first_column,
    columns,
    z_stride,
    out_stride,
    ENTROPY: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one tile's unscaled logits; programs [rows, blocks of BLOCK columns].

    z: the logits, or with KEPT what `tile_statistics` kept, with the bases kept_base [rows]. The per-row tensors [rows]
    are in the accumulation dtype. out [rows, columns] (row stride out_stride) may be z itself.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    scale = tl.load(inv_temperature + row)
    log_total = tl.load(lse + row)
    grad = tl.load(grad_logprobs + row) * scale
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(z + row.to(tl.int64) * z_stride + offsets, mask=inside, other=0.0)
    if KEPT:
        base = tl.load(kept_base + row)
        p = values.to(scale.dtype) * tl.exp(base - log_total)
        log_p = tl.log(tl.where(p > 0, p, 1.0))
    else:
        log_p = values * scale - log_total
        p = tl.exp(log_p)
    if ENTROPY:
        grad_e = tl.load(grad_entropy + row) * scale
        dz = -p * (grad + grad_e * (log_p + tl.load(entropy + row)))
    else:
        dz = -p * grad
    label = tl.load(labels + row) - first_column
    dz += tl.where(offsets == label, grad, 0.0)
    target = out + row.to(tl.int64) * out_stride + offsets
    tl.store(target, dz.to(out.dtype.element_ty), mask=inside)


class TritonTiles:
    """`TileFunctions`: the launches of both kernels."""

    def __init__(self, block: int = BLOCK) -> None:
        """`block`: columns that one program of a kernel handles at a time."""
        self._block = block

    def kept_dtype(self, like: torch.Tensor) -> torch.dtype | None:
        """See `TileFunctions`."""
        return kept_dtype(like.dtype)

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
        kept, kept_base = (z, state.maximum) if keep is None else (keep.values, keep.base)
        rows, columns = z.shape
        kernel: Any = tile_statistics
        kernel[(rows,)](
            z,
            labels,
            inv_temperature,
            state.maximum,
            state.total,
            state.label_logit,
            state.total if state.moment is None else state.moment,
            kept,
            kept_base,
            first_column,
            columns,
            z.stride(0),
            kept.stride(0),
            MARGIN,
            ENTROPY=state.moment is not None,
            KEEP=keep is not None,
            FIRST=keep is not None and keep.first,
            BLOCK=self._block,
            num_warps=WARPS,
        )

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
        with_entropy = upstream.entropy is not None and upstream.grad_entropy is not None
        rows, columns = z.shape
        kernel: Any = tile_gradient
        kernel[(rows, triton.cdiv(columns, self._block))](
            z,
            labels,
            inv_temperature,
            upstream.lse,
            upstream.entropy if with_entropy else upstream.lse,
            upstream.grad_logprobs,
            upstream.grad_entropy if with_entropy else upstream.lse,
            upstream.lse if base is None else base,
            out,
            first_column,
            columns,
            z.stride(0),
            out.stride(0),
            ENTROPY=with_entropy,
            KEPT=base is not None,
            BLOCK=self._block,
            num_warps=WARPS,
        )

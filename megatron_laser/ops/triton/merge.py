"""Kernels around the product for few rows: parts of the vocabulary merged, finished to log-probs, rows picked.

Merging is the second and last launch of a few-row call, so it does everything that is left: maximum, sum, logarithm,
the label's rules. Every value has one writer and every sum a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_laser.ops.types import IGNORE_LABEL

# A program holds a block [parts, rows] of one field in 4 warps: 16 values per thread and field.
_BLOCK = 2048
# Columns of a row that a program of `pick_rows` copies.
WIDTH = 1024
# Sizes are not specialised below: a variant for every combination of "multiple of 16", "1" and "other" would be
# compiled in the middle of a run, and these kernels move a few kilobytes.


@triton.jit
def _merged(partials, parts, rows, field_stride, part_stride, PARTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, whether it exists, maximum, sum of exp, label's logit, first pointers, shift, scale, sums) of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    here = row < rows
    inside = (part < parts)[:, None] & here[None, :]
    source = partials + part[:, None] * part_stride + row[None, :]
    m = tl.load(source, mask=inside, other=float("-inf"))
    maximum = tl.max(m, 0)
    # -inf - -inf is NaN: rows and parts without a column have no sums to move.
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    shift = tl.where(m == float("-inf"), 0.0, m - base[None, :])
    scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
    s = tl.load(source + field_stride, mask=inside, other=0.0)
    label_logit = tl.sum(tl.load(source + 2 * field_stride, mask=inside, other=0.0), 0)
    return row, here, maximum, tl.sum(s * scale, 0), label_logit, source, inside, shift, scale, s


@triton.jit(do_not_specialize=["parts", "rows", "field_stride", "part_stride"])
def merge_partials(  # type: ignore[no-untyped-def]
    partials,
    statistics,
    parts,
    rows,
    field_stride,
    part_stride,
    ENTROPY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partials [3 or 4, parts, rows] to statistics [3 or 4, rows]; a program has ROWS rows.

    The fourth field, with ENTROPY: the sum of exp(z - maximum) (z - maximum).
    """
    row, here, maximum, total, label_logit, source, inside, shift, scale, s = _merged(
        partials, parts, rows, field_stride, part_stride, PARTS, ROWS
    )
    tl.store(statistics + row, maximum, mask=here)
    tl.store(statistics + rows + row, total, mask=here)
    tl.store(statistics + 2 * rows + row, label_logit, mask=here)
    if ENTROPY:
        t = tl.load(source + 3 * field_stride, mask=inside, other=0.0)
        tl.store(statistics + 3 * rows + row, tl.sum((t + shift * s) * scale, 0), mask=here)


@triton.jit(do_not_specialize=["parts", "rows", "field_stride", "part_stride", "vocab_size"])
def finish_partials(  # type: ignore[no-untyped-def]
    partials,
    labels,
    logprobs,
    parts,
    rows,
    field_stride,
    part_stride,
    vocab_size,
    NO_LABEL: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partials [3, parts, rows] and labels [rows] int64 global to logprobs [rows]; a program has ROWS rows.

    0 for NO_LABEL, NaN for any other label outside [0, vocab_size).
    """
    row, here, maximum, total, label_logit, _, _, _, _, _ = _merged(
        partials, parts, rows, field_stride, part_stride, PARTS, ROWS
    )
    label = tl.load(labels + row, mask=here, other=NO_LABEL)
    known = (label >= 0) & (label < vocab_size)
    other = tl.where(label == NO_LABEL, 0.0, float("nan"))
    total = tl.where(here, total, 1.0)  # no logarithm of 0 beyond the last row
    tl.store(logprobs + row, tl.where(known, label_logit - maximum - tl.log(total), other), mask=here)


@triton.jit(do_not_specialize=["first", "tokens", "all_tokens"])
def pick_rows(  # type: ignore[no-untyped-def]
    hidden, positions, out, first, tokens, all_tokens, hidden_size, stride, nothing, WIDTH: tl.constexpr
):
    """hidden [tokens, H] (row stride) has the positions from `first` on: out [n, H] of positions [n] int64.

    `nothing` where another rank has the row, NaN where none has. Programs [n, pieces of WIDTH columns].
    """
    row = tl.program_id(0)
    position = tl.load(positions + row)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < hidden_size
    own = (position >= first) & (position < first + tokens)
    values = tl.load(hidden + (position - first) * stride + column, mask=inside & own, other=0.0)
    other = tl.where((position >= 0) & (position < all_tokens), nothing, float("nan"))
    # The target is 64-bit: n * H may pass 2^31.
    target = out + row.to(tl.int64) * hidden_size + column
    tl.store(target, tl.where(own, values, other.to(values.dtype)), mask=inside)


def block_of(parts: int) -> tuple[int, int]:
    """(parts, rows) of a program's block for so many parts."""
    padded = triton.next_power_of_2(parts)
    return padded, max(1, min(32, _BLOCK // padded))


def merge(partials: torch.Tensor) -> torch.Tensor:
    """[3 or 4, parts, rows] to [3 or 4, rows] on the device."""
    fields, parts, rows = partials.shape
    statistics = torch.empty((fields, rows), dtype=partials.dtype, device=partials.device)
    padded, block = block_of(parts)
    kernel: Any = merge_partials
    kernel[(triton.cdiv(rows, block),)](
        partials,
        statistics,
        parts,
        rows,
        partials.stride(0),
        partials.stride(1),
        ENTROPY=fields == 4,
        PARTS=padded,
        ROWS=block,
    )
    return statistics


def finish(partials: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Log-probs [rows] from partials [3, parts, rows] over the whole vocabulary: rows next to each other in memory,
    the other strides are free.
    """
    _, parts, rows = partials.shape
    logprobs = torch.empty((rows,), dtype=partials.dtype, device=partials.device)
    padded, block = block_of(parts)
    kernel: Any = finish_partials
    kernel[(triton.cdiv(rows, block),)](
        partials,
        labels,
        logprobs,
        parts,
        rows,
        partials.stride(0),
        partials.stride(1),
        vocab_size,
        NO_LABEL=IGNORE_LABEL,
        PARTS=padded,
        ROWS=block,
    )
    return logprobs


def pick(
    hidden: torch.Tensor, positions: torch.Tensor, first: int, all_tokens: int, nothing: float
) -> torch.Tensor:
    """`few_rows.own_rows` in one launch; a position that no rank has gives NaN."""
    tokens, hidden_size = hidden.shape
    count = positions.shape[0]
    out = torch.empty((count, hidden_size), dtype=hidden.dtype, device=hidden.device)
    kernel: Any = pick_rows
    kernel[(count, triton.cdiv(hidden_size, WIDTH))](
        hidden,
        positions,
        out,
        first,
        tokens,
        all_tokens,
        hidden_size,
        hidden.stride(0),
        nothing,
        WIDTH=WIDTH,
    )
    return out

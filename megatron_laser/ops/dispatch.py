"""Which implementation a shape gets on CUDA, and why. Pure: no device is touched.

The tables are short on purpose, and each rule names what it rests on. `megatron-laser bench logprob` and
`bench score` time every implementation on the same shapes, which is how a rule is checked or replaced.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Shape(NamedTuple):
    """One call on one rank: hidden rows, hidden size, real columns of this shard."""

    rows: int
    hidden_size: int
    columns: int


class Choice(NamedTuple):
    """The implementation's name and the reason in one sentence."""

    name: str
    reason: str


class Rule(NamedTuple):
    """Shapes of at least `rows` rows get `name`; the first rule that fits counts."""

    rows: int
    name: str
    source: str


# Per logit, one product costs 2 H operations and the logits of the chunks 8 bytes (written, read once): both are the
# same for any number of rows. With H = 5120 on an H200 (790 TFLOP/s, 4.3 TB/s) that is 13.0 + 2.1 ps, and cuBLAS's
# float32 output adds 2 %: chunks take 1.12 to 1.16 of the product. The fused kernel writes no logits, but it has no
# multicast, so its tiles come out of L2 at 7 to 8 TB/s, and its softmax follows each tile in the same warps: 560 to 620
# TFLOP/s, 1.27 to 1.4 of the product. Only the weight's read depends on the rows: 2 H bytes a column, as long as the
# products of 180 rows. Up to there everyone waits for it, the fused kernel in one launch and without logits.
# Predicted, not measured; the first GPU hour's `kernels` stage times both sides of the rule.
FORWARD_RULES = (
    Rule(
        256,
        "chunked",
        "the product at cuBLAS's rate and 8 bytes a logit against a fused kernel's rate; predicted",
    ),
    Rule(
        0, "fused", "one read of the weight is most of the time, and the logits are never written; predicted"
    ),
)
# The kernels below are built for what one read of the weight bounds.
CUDA_MAX_ROWS = 128
FEW_ROWS_MAX = 64


@functools.lru_cache(maxsize=256)
def choose_forward(shape: Shape, *, tma_refuses: str | None) -> Choice:
    """The forward of `linear_logprob`: "chunked" or "fused". `tma_refuses`: why tensor descriptors do not fit."""
    rule = next(rule for rule in FORWARD_RULES if shape.rows >= rule.rows)
    if rule.name == "fused" and tma_refuses is not None:
        return Choice("chunked", f"the fused kernel cannot run: {tma_refuses}")
    return Choice(rule.name, f"{shape.rows} rows, rule from {rule.rows} rows: {rule.source}")


@functools.lru_cache(maxsize=256)
def choose_few_rows(shape: Shape, *, tma_refuses: str | None, cuda_refuses: str | None) -> Choice:
    """The few-row op: "cuda", "few_rows" or "fused" (Triton), or from 256 rows what `choose_forward` says.

    cuda_refuses: why the CUDA C++ kernel cannot run (not a Hopper device, no nvcc), or None.
    """
    if tma_refuses is not None:
        return Choice("chunked", f"the few-row kernels cannot run: {tma_refuses}")
    if shape.rows >= FORWARD_RULES[0].rows:
        return choose_forward(shape, tma_refuses=None)
    if shape.rows > CUDA_MAX_ROWS:
        return Choice("fused", f"{shape.rows} rows: the CUDA kernel takes at most {CUDA_MAX_ROWS}")
    if cuda_refuses is None:
        return Choice("cuda", f"{shape.rows} rows: bound by one read of the weight")
    name = "few_rows" if shape.rows <= FEW_ROWS_MAX else "fused"
    return Choice(name, f"{shape.rows} rows, and the CUDA kernel cannot run: {cuda_refuses}")

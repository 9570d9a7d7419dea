"""Which implementation a shape gets on CUDA, and why. Pure: no device is touched.

The tables are short on purpose, and each rule names what it rests on. `megatron-laser bench logprob` and
`bench score` time every implementation on the same shapes, which is how a rule is checked or replaced.
"""

from __future__ import annotations

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


# Chunked cuBLAS reaches 650 to 730 TFLOP/s on an H200, Triton kernels with a fused softmax 210 to 470 (published,
# Liger-Kernel's thread on Hopper kernels). Below 1024 rows the product no longer dominates: what counts is that the
# logits are not written and read, 8 bytes for 2 * H operations each, and that there is one launch, not one per slice.
FORWARD_RULES = (
    Rule(1024, "chunked", "published H200 rates of cuBLAS and of fused Triton kernels; not measured here"),
    Rule(0, "fused", "traffic of the logits against one read of the weight; a model, not measured here"),
)
# One read of the weight bounds the time up to about 180 rows; the kernels below are built for less than that.
CUDA_MAX_ROWS = 128
FEW_ROWS_MAX = 64
FUSED_MAX_ROWS = 512


def choose_forward(shape: Shape, *, tma_refuses: str | None) -> Choice:
    """The forward of `linear_logprob`: "chunked" or "fused". `tma_refuses`: why tensor descriptors do not fit."""
    rule = next(rule for rule in FORWARD_RULES if shape.rows >= rule.rows)
    if rule.name == "fused" and tma_refuses is not None:
        return Choice("chunked", f"the fused kernel cannot run: {tma_refuses}")
    return Choice(rule.name, f"{shape.rows} rows, rule from {rule.rows} rows: {rule.source}")


def choose_few_rows(shape: Shape, *, tma_refuses: str | None, cuda_refuses: str | None) -> Choice:
    """The few-row op: "cuda", "few_rows" or "fused" (Triton), or above 512 rows what `choose_forward` says.

    cuda_refuses: why the CUDA C++ kernel cannot run (not a Hopper device, no nvcc), or None.
    """
    if tma_refuses is not None:
        return Choice("chunked", f"the few-row kernels cannot run: {tma_refuses}")
    if shape.rows > FUSED_MAX_ROWS:
        return choose_forward(shape, tma_refuses=None)
    if shape.rows > CUDA_MAX_ROWS:
        return Choice("fused", f"{shape.rows} rows: the CUDA kernel takes at most {CUDA_MAX_ROWS}")
    if cuda_refuses is None:
        return Choice("cuda", f"{shape.rows} rows: bound by one read of the weight")
    name = "few_rows" if shape.rows <= FEW_ROWS_MAX else "fused"
    return Choice(name, f"{shape.rows} rows, and the CUDA kernel cannot run: {cuda_refuses}")

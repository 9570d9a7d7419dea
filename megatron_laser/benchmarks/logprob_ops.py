"""What `bench logprob` and `bench score` compare: this package's op in its variants, plain torch, and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_laser.benchmarks.logprob_implementation import Implementation, Op, dense
from megatron_laser.benchmarks.logprob_peers import peers
from megatron_laser.ops import configure, few_row_logprob, linear_logprob, torch_backend
from megatron_laser.ops.device import kernels_refuse
from megatron_laser.ops.few_rows import FewRowReducer

# Bytes of the probabilities of one block of rows where the loss is inside.
_BLOCK_BYTES = int(1.25e9)


def training_ops(device: torch.device) -> Iterator[Implementation]:
    """Contenders with a gradient; the peers on CUDA only."""
    kept = _keeping(lambda nbytes: 2 * nbytes)
    yield Implementation(
        "megatron_laser", lambda *inputs: linear_logprob(*inputs).logprobs, ours=True, remark=_forward_choice
    )
    yield Implementation(
        "megatron_laser: main_grad",
        lambda *inputs: linear_logprob(*inputs).logprobs,
        ours=True,
        main_grad=True,
    )
    yield Implementation("megatron_laser: recompute", _keeping(lambda nbytes: 0), ours=True)
    yield Implementation("megatron_laser: kept", kept, ours=True)
    yield Implementation("megatron_laser: kept, main_grad", kept, ours=True, main_grad=True)
    yield Implementation(
        "megatron_laser: kept, half the rows",
        kept,
        ours=True,
        half=True,
        remark=lambda hidden, weight: "every other row has no gradient",
    )
    for main_grad, suffix in ((False, ""), (True, ", main_grad")):
        yield Implementation(f"megatron_laser: in blocks{suffix}", _in_blocks, True, main_grad=main_grad)
    if device.type == "cuda" and kernels_refuse(device) is None:
        from megatron_laser.ops import gpu_backend

        for name, engine in gpu_backend.FORWARD_ENGINES.items():
            yield Implementation(f"megatron_laser: {name}", _with_engine(engine), ours=True)
    yield Implementation("torch, tiled", lambda *inputs: torch_backend.linear_logprob(*inputs).logprobs, True)
    yield Implementation("torch, dense", dense)
    if device.type == "cuda":
        yield from peers()


def score_ops(device: torch.device) -> Iterator[Implementation]:
    """Contenders for few rows, without gradient."""
    yield Implementation("megatron_laser", few_row_logprob, ours=True, remark=_few_row_choice)
    if device.type == "cuda" and kernels_refuse(device) is None:
        from megatron_laser.ops import gpu_backend

        for name, engine in gpu_backend.FEW_ROW_ENGINES.items():
            yield Implementation(f"megatron_laser: {name}", _few_with_engine(engine), ours=True)
    yield Implementation("torch, tiled", torch_backend.few_row_logprob, ours=True)
    yield Implementation("torch, dense", dense)


def _forward_choice(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    if hidden.device.type != "cuda" or kernels_refuse(hidden.device) is not None:
        return ""
    from megatron_laser.ops import gpu_backend

    return f"uses {gpu_backend.forward_choice(hidden, weight, len(hidden), weight.shape[0]).name}"


def _few_row_choice(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    if hidden.device.type != "cuda" or kernels_refuse(hidden.device) is not None:
        return ""
    from megatron_laser.ops import gpu_backend

    return f"uses {gpu_backend.few_row_choice(hidden, weight, weight.shape[0]).name}"


def _with_engine(engine: type) -> Op:
    from megatron_laser.ops import gpu_backend

    return lambda *inputs: gpu_backend.linear_logprob(*inputs, engine=engine()).logprobs


def _keeping(chosen: Callable[[int], int]) -> Op:
    """With `chosen` bytes allowed to be kept, given those of all logits in the dtype of the rows."""

    def run(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Tiles are padded to whole vectors.
        nbytes = (hidden.shape[0] + 16) * (weight.shape[0] + 16) * max(2, hidden.element_size())
        before = configure(keep_logits_bytes=chosen(nbytes))
        try:
            return linear_logprob(hidden, weight, labels).logprobs
        finally:
            configure(keep_logits_bytes=before.keep_logits_bytes)

    return run


def _in_blocks(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss inside, with memory for the probabilities of some of the rows."""
    nbytes = hidden.shape[0] * weight.shape[0] * max(2, hidden.element_size())
    before = configure(keep_logits_bytes=min(_BLOCK_BYTES, nbytes // 4), min_block_rows=16)
    try:
        return linear_logprob(
            hidden, weight, labels, loss=lambda logprobs, entropy, rows: logprobs.sum()
        ).logprobs
    finally:
        configure(keep_logits_bytes=before.keep_logits_bytes, min_block_rows=before.min_block_rows)


def _few_with_engine(engine: Callable[[], FewRowReducer]) -> Op:
    from megatron_laser.ops import gpu_backend

    return lambda *inputs: gpu_backend.few_row_logprob(*inputs, engine=engine())

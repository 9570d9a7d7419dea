"""What `bench logprob` and `bench score` compare: this package's op, plain torch, and peers that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_laser.ops import IGNORE_LABEL, configure, few_row_logprob, linear_logprob, torch_backend
from megatron_laser.ops.device import kernels_refuse
from megatron_laser.ops.few_rows import FewRowReducer
from megatron_laser.ops.tiles import accumulation_dtype

Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """One contender: (hidden, weight, labels) -> log-probs [rows], or their sum where `only_sum`.

    ours: a wrong result is an error, not a remark. main_grad: dW goes to the weight's float32 `main_grad`.
    remark: what the table adds, given hidden and weight.
    """

    name: str
    run: Op
    ours: bool = False
    only_sum: bool = False
    main_grad: bool = False
    remark: Callable[[torch.Tensor, torch.Tensor], str] = lambda hidden, weight: ""


def dense(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What most trainers do: all logits, in the accumulation dtype, then log_softmax and gather."""
    logits = torch.nn.functional.linear(hidden, weight).to(accumulation_dtype(hidden))
    logprobs = torch.log_softmax(logits, dim=1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return logprobs.where(labels != IGNORE_LABEL, 0)


def training_ops(device: torch.device) -> Iterator[Implementation]:
    """Contenders with a gradient."""
    yield Implementation(
        "megatron_laser", lambda *inputs: linear_logprob(*inputs).logprobs, ours=True, remark=_forward_choice
    )
    yield Implementation(
        "megatron_laser: main_grad",
        lambda *inputs: linear_logprob(*inputs).logprobs,
        ours=True,
        main_grad=True,
    )
    if device.type == "cuda" and kernels_refuse(device) is None:
        from megatron_laser.ops import gpu_backend

        for name, engine in gpu_backend.FORWARD_ENGINES.items():
            yield Implementation(f"megatron_laser: {name}", _with_engine(engine), ours=True)
        yield Implementation("megatron_laser: kept", _kept, ours=True)
    yield Implementation("torch, tiled", lambda *inputs: torch_backend.linear_logprob(*inputs).logprobs, True)
    yield Implementation("torch, dense", dense)
    if device.type != "cuda":
        return
    if importlib.util.find_spec("liger_kernel") is not None:
        yield Implementation("Liger-Kernel", _liger, only_sum=True, remark=_forward_has_the_backward)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        yield Implementation("cut-cross-entropy", _cut_cross_entropy)


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


def _forward_has_the_backward(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    return "most of its backward runs in its forward"


def _with_engine(engine: type) -> Op:
    from megatron_laser.ops import gpu_backend

    return lambda *inputs: gpu_backend.linear_logprob(*inputs, engine=engine()).logprobs


def _kept(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All probabilities are kept for the backward, which then makes two products, not three."""
    from megatron_laser.ops import gpu_backend

    before = configure(keep_logits_bytes=2 * (hidden.shape[0] + 16) * (weight.shape[0] + 16))
    try:
        engine = gpu_backend.ChunkedEngine()
        return gpu_backend.linear_logprob(hidden, weight, labels, engine=engine).logprobs
    finally:
        configure(keep_logits_bytes=before.keep_logits_bytes)


def _few_with_engine(engine: Callable[[], FewRowReducer]) -> Op:
    from megatron_laser.ops import gpu_backend

    return lambda *inputs: gpu_backend.few_row_logprob(*inputs, engine=engine())


def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


def _cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Without its filter of small gradients, which is biased once tokens have different weights.
    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None)

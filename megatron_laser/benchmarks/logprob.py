"""The log-prob op against its floor: one product forward, three backward, or for few rows one read of the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from megatron_laser.benchmarks.logprob_implementation import Implementation
from megatron_laser.benchmarks.logprob_ops import score_ops, training_ops
from megatron_laser.benchmarks.logprob_report import Measurement, Report, Shape
from megatron_laser.benchmarks.measure import (
    Ceilings,
    host_seconds_per_call,
    measure_ceilings,
    peak_allocated_bytes,
    seconds_per_call,
)
from megatron_laser.benchmarks.result import provenance
from megatron_laser.model import platform
from megatron_laser.ops import IGNORE_LABEL, add_weight_gradient_to_main_grad

_CHECKED_ROWS = 64
# Of ours: float32 accumulation of exact products of bf16 values stays far below.
_LOGPROB_LIMIT, _GRADIENT_LIMIT = 1e-3, 0.02
# Of others: logits that are rounded to bf16 are off by up to 0.1 and still are what people use.
_PEER_LIMIT = 0.2

Listener = Callable[[Measurement], None]


class _WrongResult(RuntimeError):
    """An implementation disagrees with float64; its time would mean nothing."""


def bench_logprob(shapes: Iterable[Shape] | None = None, *, listener: Listener | None = None) -> Report:
    """Forward and backward of `linear_logprob` and its contenders; by default the shapes of a 32B and a 7B model.

    listener: called with each measurement as soon as it is made, so that a crash loses only the rest.
    """
    if shapes is None:
        if platform.has_cuda():
            shapes = [Shape(16384, hidden, 152064 // tp, tp) for hidden in (5120, 3584) for tp in (1, 8)]
        else:
            shapes = [Shape(256, 128, 8192 // tp, tp) for tp in (1, 8)]
    ceilings = measure_ceilings(_dtype())
    measurements = []
    for shape in shapes:
        product = 2 * shape.rows * shape.hidden * shape.columns
        for one in training_ops(platform.device()):
            found = _measure(one, shape, product / ceilings.flops, 3 * product / ceilings.flops)
            measurements.append(_told(found, listener))
    return _report("linear_logprob", ceilings, "TFLOP/s", measurements)


def bench_score(shapes: Iterable[Shape] | None = None, *, listener: Listener | None = None) -> Report:
    """`few_row_logprob` and its contenders; by default 16, 128 and 512 rows of a 32B model, whole and sharded."""
    if shapes is None:
        hidden, vocabulary = (5120, 152064) if platform.has_cuda() else (128, 8192)
        shapes = [Shape(rows, hidden, vocabulary // tp, tp) for tp in (1, 8) for rows in (16, 128, 512)]
    ceilings = measure_ceilings(_dtype())
    measurements = []
    for shape in shapes:
        read = shape.hidden * shape.columns * _dtype().itemsize / ceilings.bytes
        floor = max(read, 2 * shape.rows * shape.hidden * shape.columns / ceilings.flops)
        for one in score_ops(platform.device()):
            measurements.append(_told(_measure(one, shape, floor, None), listener))
    return _report("few_row_logprob", ceilings, "GB/s", measurements)


def _told(measurement: Measurement, listener: Listener | None) -> Measurement:
    if listener is not None:
        listener(measurement)
    platform.empty_cache()  # the next contender's large tensors would find the memory in pieces
    return measurement


def _report(title: str, ceilings: Ceilings, unit: str, measurements: list[Measurement]) -> Report:
    return Report(provenance(), title, ceilings, unit, measurements)


def _dtype() -> torch.dtype:
    return torch.bfloat16 if platform.has_cuda() else torch.float32


def _measure(
    implementation: Implementation, shape: Shape, forward_floor: float, backward_floor: float | None
) -> Measurement:
    """Check, then time; a contender that cannot run or is wrong gets a note instead of a time."""
    with_gradient = backward_floor is not None
    known = (shape, implementation.name, forward_floor, backward_floor)
    try:
        error = _check(implementation, shape, with_gradient)
        hidden, weight, labels = inputs(shape, with_gradient, implementation.main_grad)

        def forward() -> torch.Tensor:
            return implementation.run(hidden, weight, labels)

        def once() -> None:
            forward()

        def step() -> None:
            hidden.grad = weight.grad = None
            _loss(implementation, forward()).backward()

        seconds = seconds_per_call(forward)
        both = seconds_per_call(step) if with_gradient else None
        host = host_seconds_per_call(forward)
        forward_peak = peak_allocated_bytes(once)
        hidden.grad = weight.grad = None
        peak = peak_allocated_bytes(step) if with_gradient else forward_peak
        note = implementation.remark(hidden, weight)
    except _WrongResult as wrong:
        return Measurement(*known, note=str(wrong), wrong=implementation.ours)
    except Exception as problem:
        # Whatever a contender, or a kernel on a device it is not for, raises: the others are still measured.
        text = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:80]}"
        return Measurement(*known, note=text)
    work = 2 * shape.rows * shape.hidden * shape.columns / 1e12
    if not with_gradient:
        work = shape.hidden * shape.columns * weight.element_size() / 1e9
    return Measurement(
        *known,
        error=error,
        forward=seconds,
        backward=None if both is None else both - seconds,
        forward_peak_bytes=forward_peak if with_gradient else None,
        peak_bytes=peak,
        rate=work / seconds,
        both=both,
        host=host,
        note=note,
    )


def _loss(implementation: Implementation, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs[::2] if implementation.half else logprobs).sum()


def inputs(
    shape: Shape, with_gradient: bool, main_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden rows and weight whose logits spread over a few nats, and labels.

    main_grad: the weight is as Megatron's DistributedDataParallel leaves it, and dW goes to `weight.main_grad`.
    """
    device, dtype = platform.device(), _dtype()
    torch.manual_seed(0)
    hidden = torch.randn(shape.rows, shape.hidden, device=device).mul_(2 * shape.hidden**-0.5).to(dtype)
    weight = torch.randn(shape.columns, shape.hidden, device=device, dtype=dtype)
    labels = torch.randint(0, shape.columns, (shape.rows,), device=device)
    hidden.requires_grad_(with_gradient)
    weight.requires_grad_(with_gradient)
    if main_grad:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        add_weight_gradient_to_main_grad(weight)
    return hidden, weight, labels


def _check(implementation: Implementation, shape: Shape, with_gradient: bool) -> float:
    """Largest error of a log-prob in nats against float64, on the very shape that is timed.

    Only some rows are labelled, so that the reference needs the logits of these alone; dX of their rows and all of dW
    are compared, too. Raises _WrongResult.
    """
    hidden, weight, labels = inputs(shape, with_gradient, implementation.main_grad)
    chosen = torch.linspace(0, shape.rows - 1, min(shape.rows, _CHECKED_ROWS), device=labels.device).long()
    some = torch.full_like(labels, IGNORE_LABEL).scatter_(0, chosen, labels[chosen])
    exact_rows = hidden.detach()[chosen].double().requires_grad_(with_gradient)
    exact_weight = weight.detach().double().requires_grad_(with_gradient)
    log_p = torch.log_softmax(exact_rows @ exact_weight.t(), 1)
    expected = log_p.gather(1, labels[chosen].unsqueeze(1)).squeeze(1)
    actual = implementation.run(hidden, weight, some)
    if implementation.only_sum:
        error = float((actual.detach().double() - expected.detach().sum()).abs()) / len(chosen)
    else:
        error = float((actual.detach()[chosen].double() - expected.detach()).abs().max())
    if not error <= (_LOGPROB_LIMIT if implementation.ours else _PEER_LIMIT):
        raise _WrongResult(f"{implementation.name} is off by {error:.2g} nats on {shape}")
    if with_gradient:
        _loss(implementation, actual).backward()
        (expected[chosen % 2 == 0] if implementation.half else expected).sum().backward()
        grad_weight = weight.main_grad if implementation.main_grad else weight.grad  # type: ignore[attr-defined]
        assert hidden.grad is not None and grad_weight is not None
        for name, got, want in (
            ("dX", hidden.grad[chosen], exact_rows.grad),
            ("dW", grad_weight, exact_weight.grad),
        ):
            assert want is not None
            off = float((got.double() - want).norm() / want.norm())
            if not off <= _GRADIENT_LIMIT:
                raise _WrongResult(
                    f"{implementation.name}: {name} is off by {off:.2g} of its norm on {shape}"
                )
    return error

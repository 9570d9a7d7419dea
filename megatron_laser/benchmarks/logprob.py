"""The log-prob op against its floor: one product forward, three backward, or for few rows one read of the weight."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_laser.benchmarks.ceilings import Ceilings, measure_ceilings, seconds_per_call
from megatron_laser.benchmarks.logprob_ops import Implementation, score_ops, training_ops
from megatron_laser.benchmarks.memory import peak_allocated_bytes
from megatron_laser.model import platform
from megatron_laser.ops import IGNORE_LABEL

_CHECKED_ROWS = 64
# Of ours: float32 accumulation of exact products of bf16 values stays far below.
_LOGPROB_LIMIT, _GRADIENT_LIMIT = 1e-3, 0.02
# Of others: logits that are rounded to bf16 are off by up to 0.1 and still are what people use.
_PEER_LIMIT = 0.2


class WrongResultError(RuntimeError):
    """An implementation of this package disagrees with float64; its time would mean nothing."""


@dataclass(frozen=True)
class Shape:
    """rows x hidden times a shard of `columns` of the vocabulary, one of `shards`."""

    rows: int
    hidden: int
    columns: int
    shards: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.hidden} x {self.columns} (tp {self.shards})"


@dataclass(frozen=True)
class Measurement:
    """Seconds, bytes on top of the inputs; None where there is nothing to measure. error: largest, in nats.

    forward_floor, backward_floor: seconds at the measured ceiling of the device. note: why it was not timed.
    """

    shape: Shape
    implementation: str
    error: float | None
    forward: float | None
    backward: float | None
    forward_floor: float
    backward_floor: float | None
    peak_bytes: int | None
    rate: float | None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All measurements of one run; `unit` is TFLOP/s or GB/s of the forward."""

    title: str
    torch: str
    threads: int
    ceilings: Ceilings
    unit: str
    measurements: list[Measurement]

    def table(self) -> str:
        """A table for people."""
        ceilings = self.ceilings
        lines = [
            f"{self.title} on {ceilings.device}, {ceilings.dtype}, torch {self.torch}, {self.threads} thread(s); "
            f"ceilings measured here: {ceilings.flops / 1e12:.4g} TFLOP/s, {ceilings.bytes / 1e9:.4g} GB/s",
        ]
        if not platform.has_cuda():
            lines.append(
                "No CUDA device: small shapes and the torch implementations only; this says nothing of GPUs."
            )
        for shape in dict.fromkeys(one.shape for one in self.measurements):
            lines.append("")
            lines.append(
                f"{shape!s:34s} {'forward ms':>10s} {'/ floor':>8s} {'backward ms':>11s} {'/ floor':>8s} "
                f"{'peak MiB':>9s} {self.unit:>8s} {'error':>8s}"
            )
            lines += [_line(one) for one in self.measurements if one.shape == shape]
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write NAME.json and NAME.png."""
        from megatron_laser.benchmarks.logprob_plot import plot

        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.json"
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return [file, plot(self, folder / f"{name}.png")]


def _line(one: Measurement) -> str:
    def number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    def ratio(value: float | None, floor: float | None) -> str:
        return "-" if value is None or floor is None else f"{value / floor:.2f}"

    error = "-" if one.error is None else f"{one.error:.0e}"
    return (
        f"  {one.implementation:32s} {number(one.forward, 1e3):>10s} {ratio(one.forward, one.forward_floor):>8s} "
        f"{number(one.backward, 1e3):>11s} {ratio(one.backward, one.backward_floor):>8s} "
        f"{number(one.peak_bytes, 2**-20, 1):>9s} {number(one.rate, digits=2):>8s} {error:>8s}  {one.note}"
    ).rstrip()


def bench_logprob(shapes: Iterable[Shape] | None = None) -> Report:
    """Forward and backward of `linear_logprob` and its contenders; by default the shapes of a 32B and a 7B model."""
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
            measurements.append(_measure(one, shape, product / ceilings.flops, 3 * product / ceilings.flops))
    return _report("linear_logprob", ceilings, "TFLOP/s", measurements)


def bench_score(shapes: Iterable[Shape] | None = None) -> Report:
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
            measurements.append(_measure(one, shape, floor, None))
    return _report("few_row_logprob", ceilings, "GB/s", measurements)


def _report(title: str, ceilings: Ceilings, unit: str, measurements: list[Measurement]) -> Report:
    return Report(title, torch.__version__, torch.get_num_threads(), ceilings, unit, measurements)


def _dtype() -> torch.dtype:
    return torch.bfloat16 if platform.has_cuda() else torch.float32


def _measure(
    implementation: Implementation, shape: Shape, forward_floor: float, backward_floor: float | None
) -> Measurement:
    """Check, then time; a contender that cannot run or is wrong gets a note instead of a time."""
    with_gradient = backward_floor is not None
    failed = dict(error=None, forward=None, backward=None, peak_bytes=None, rate=None)
    floors = dict(forward_floor=forward_floor, backward_floor=backward_floor)
    try:
        error = _check(implementation, shape, with_gradient)
        hidden, weight, labels = _inputs(shape, with_gradient)

        def forward() -> torch.Tensor:
            return implementation.run(hidden, weight, labels)

        def once() -> None:
            forward()

        def step() -> None:
            hidden.grad = weight.grad = None
            forward().sum().backward()

        seconds = seconds_per_call(forward)
        both = seconds_per_call(step) if with_gradient else None
        peak = peak_allocated_bytes(step if with_gradient else once)
        note = implementation.remark(hidden, weight)
    except WrongResultError as wrong:
        if implementation.ours:
            raise
        return Measurement(shape, implementation.name, note=str(wrong), **failed, **floors)  # type: ignore[arg-type]
    except Exception as problem:
        # Whatever a contender, or a kernel on a device it is not for, raises: the others are still measured.
        text = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:80]}"
        return Measurement(shape, implementation.name, note=text, **failed, **floors)  # type: ignore[arg-type]
    work = 2 * shape.rows * shape.hidden * shape.columns / 1e12
    if not with_gradient:
        work = shape.hidden * shape.columns * weight.element_size() / 1e9
    return Measurement(
        shape,
        implementation.name,
        error,
        seconds,
        None if both is None else both - seconds,
        forward_floor,
        backward_floor,
        peak,
        work / seconds,
        note,
    )


def _inputs(shape: Shape, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden rows and weight whose logits spread over a few nats, and labels."""
    device, dtype = platform.device(), _dtype()
    torch.manual_seed(0)
    hidden = torch.randn(shape.rows, shape.hidden, device=device).mul_(2 * shape.hidden**-0.5).to(dtype)
    weight = torch.randn(shape.columns, shape.hidden, device=device, dtype=dtype)
    labels = torch.randint(0, shape.columns, (shape.rows,), device=device)
    return hidden.requires_grad_(with_gradient), weight.requires_grad_(with_gradient), labels


def _check(implementation: Implementation, shape: Shape, with_gradient: bool) -> float:
    """Largest error of a log-prob in nats against float64, on the very shape that is timed.

    Only some rows are labelled, so that the reference needs the logits of these alone; dX of their rows and all of dW
    are compared, too. Raises WrongResultError.
    """
    hidden, weight, labels = _inputs(shape, with_gradient)
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
        raise WrongResultError(f"{implementation.name} is off by {error:.2g} nats on {shape}")
    if with_gradient:
        actual.sum().backward()
        expected.sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        for name, got, want in (
            ("dX", hidden.grad[chosen], exact_rows.grad),
            ("dW", weight.grad, exact_weight.grad),
        ):
            assert want is not None
            off = float((got.double() - want).norm() / want.norm())
            if not off <= _GRADIENT_LIMIT:
                raise WrongResultError(
                    f"{implementation.name}: {name} is off by {off:.2g} of its norm on {shape}"
                )
    return error

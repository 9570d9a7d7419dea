"""Stage `kernels`, correctness: every engine against float64, and what the accumulator loses."""

from __future__ import annotations

import itertools

import torch
from helpers.logprob import gradients, inputs, largest_logit, reference, tensor_core_tolerance

from gpu_day_one.stage import Stage
from megatron_laser.model import platform
from megatron_laser.ops import IGNORE_LABEL, configure, tiles
from megatron_laser.ops.cuda import few_rows as cuda_few_rows
from megatron_laser.ops.cuda.plan import every_plan


def engines(stage: Stage) -> None:
    """Rounding of the products, then the Triton engines: log-probs, entropies, dX, dW, same bits twice."""
    if not stage.rehearse:
        _rounding(stage)
    from megatron_laser.ops import gpu_backend

    dtype = torch.float32 if stage.rehearse else torch.bfloat16
    configure(tile_bytes=stage.size(8 * 2**20, 4096))
    failed = []
    shapes = stage.size([(1, 64, 100), (37, 128, 1003), (1025, 1536, 20011)], [(1, 16, 33), (12, 16, 70)])
    for rows, hidden_size, columns in shapes:
        for name, engine in gpu_backend.FORWARD_ENGINES.items():
            hidden, weight, labels = _problem(rows, hidden_size, columns, dtype)
            settings = stage.size({}, {"block": 64} if name == "chunked" else {})

            def op(x, w, labels=labels, engine=engine, settings=settings):
                return gpu_backend.linear_logprob(x, w, labels, with_entropy=True, engine=engine(**settings))

            try:
                got, *grads = gradients(op, hidden, weight)
                again = gradients(op, hidden, weight)
            except Exception as error:
                failed.append(name)
                stage.note(
                    "exact", engine=name, shape=str((rows, hidden_size, columns)), failed=_short(error)
                )
                continue
            want, *exact = gradients(
                lambda x, w, labels=labels: reference(x, w, labels), hidden.double(), weight.double()
            )
            tolerance = tensor_core_tolerance(largest_logit(hidden, weight), hidden_size)
            errors = [float((a.double() - b).abs().max()) for a, b in zip(got, want)]
            off = [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(grads, exact)]
            same = all(torch.equal(a, b) for a, b in zip([*got, *grads], [*again[0], *again[1:]]))
            right = max(errors) <= tolerance and max(off) <= 2**-6 and same
            failed += [] if right else [name]
            stage.note(
                "exact",
                engine=name,
                shape=str((rows, hidden_size, columns)),
                right=right,
                error_logprob=errors[0],
                error_entropy=errors[1],
                allowed=tolerance,
                off_dx=off[0],
                off_dw=off[1],
                same_bits=same,
            )
    if failed:
        raise SystemExit(f"not exact: {', '.join(dict.fromkeys(failed))}")


def cuda_kernel(stage: Stage) -> None:
    """Every CUDA C++ kernel for few rows against float64."""
    hidden, weight, labels = _problem(16, 64, 100, torch.bfloat16)
    reason = cuda_few_rows.refuses(hidden, weight)
    if reason is not None:
        stage.note("cuda_kernel", needs=reason)
        if stage.rehearse:
            return
        raise SystemExit(f"the CUDA C++ kernel cannot run: {reason}")
    from megatron_laser.ops import gpu_backend

    wrong = False
    for shape, plan in itertools.product(
        (
            (16, 64, 256),
            (1, 64, 100),
            (17, 200, 1003),
            (64, 1536, 20011),
            (65, 1536, 20011),
            (128, 5120, 152064),
            (128, 5120, 19008),
        ),
        every_plan(),
    ):
        if plan.rows < shape[0]:
            continue
        hidden, weight, labels = _problem(*shape, torch.bfloat16)
        got = [
            gpu_backend.few_row_logprob(hidden, weight, labels, engine=cuda_few_rows.CudaFewRowEngine(plan))
            for _ in range(3)
        ]
        error = float((got[0].double() - reference(hidden, weight, labels)[0]).abs().max())
        allowed = tensor_core_tolerance(largest_logit(hidden, weight), shape[1])
        same = all(torch.equal(got[0], other) for other in got)
        wrong |= error > allowed or not same
        stage.note(
            "cuda_kernel", kernel=plan.name, shape=str(shape), error=error, allowed=allowed, same_bits=same
        )
    if wrong:
        raise SystemExit("the CUDA C++ kernel is not exact")


def _rounding(stage: Stage) -> None:
    """Mean error of |z| in half ulps of 1: 0 when sums are rounded to nearest, negative when they are cut off."""
    for hidden_size in (128, 1536, 5120):
        hidden, weight, _ = _problem(256, hidden_size, 4096, torch.bfloat16)
        product = tiles.mm(hidden, weight.t()).double()
        exact = hidden.double() @ weight.double().t()
        bias = ((product.abs() - exact.abs()) / exact.abs().clamp(min=0.5)).mean() * 2**24
        stage.note(
            "rounding",
            hidden=hidden_size,
            bias_half_ulps=float(bias),
            largest=float((product - exact).abs().max()),
        )


def _problem(rows: int, hidden_size: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    device = platform.device()
    if columns < 100_000:
        made = inputs(rows, hidden_size, columns, dtype, scale=hidden_size**-0.5 * 4)
        return tuple(tensor.to(device) for tensor in made)
    torch.manual_seed(0)  # on the device: the host would take a minute
    hidden = (torch.randn(rows, hidden_size, device=device) * hidden_size**-0.5 * 4).to(dtype)
    weight = torch.randn(columns, hidden_size, device=device, dtype=dtype)
    labels = torch.randint(0, columns, (rows,), device=device)
    labels[::5] = IGNORE_LABEL
    return hidden, weight, labels


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]

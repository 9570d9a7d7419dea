"""Stage `kernels`, speed: the figures of docs/kernels.md with peers beside them, and what the open choices cost."""

from __future__ import annotations

from dataclasses import asdict

import torch

from gpu_day_one.stage import Stage
from megatron_laser.benchmarks import logprob
from megatron_laser.benchmarks.logprob_report import Measurement, Report, Shape
from megatron_laser.benchmarks.measure import seconds_per_call
from megatron_laser.model import platform
from megatron_laser.ops import configure


def linear(stage: Stage) -> None:
    """`bench logprob`: forward, backward, their sum and peaks, of ours and of the peers."""
    shapes = stage.size(None, [Shape(24, 16, 96, 1)])
    _finish(stage, "logprob", logprob.bench_logprob(shapes, listener=_listener(stage)))


def score(stage: Stage) -> None:
    """`bench score`: 16, 128 and 512 rows."""
    shapes = stage.size(None, [Shape(4, 16, 96, 1)])
    _finish(stage, "score", logprob.bench_score(shapes, listener=_listener(stage)))


def _listener(stage: Stage) -> logprob.Listener:
    def listen(one: Measurement) -> None:
        floor = one.backward_floor
        fields = asdict(one) | {
            "shape": str(one.shape),
            "sum": one.both,
            "sum_over_3_products": one.both / floor if one.both and floor else None,
            "forward_over_floor": one.forward / one.forward_floor if one.forward else None,
            "backward_over_floor": one.backward / floor if one.backward and floor else None,
        }
        stage.note(
            one.implementation,
            **{key: value for key, value in fields.items() if value not in (None, "", False)},
        )

    return listen


def _finish(stage: Stage, name: str, report: Report) -> None:
    print(report.table(), flush=True)
    if not stage.rehearse:
        report.write(stage.out, name)
    if report.wrong:
        raise SystemExit("; ".join(one.note for one in report.wrong))


def choices(stage: Stage) -> None:
    """Tile size and kept probabilities, and from how many rows on the chunks beat the fused forward."""
    if stage.rehearse:
        _head(stage, "chunked", stage.size(0, 12), 16, 70, tile_bytes=4096)
        return
    mib = 2**20
    for columns in (152064, 19008):
        for tile in (512, 528, 1280, 512):  # the first again at the end: has the clock drifted?
            _head(stage, "chunked", 16384, 5120, columns, tile_bytes=tile * mib)
        _head(stage, "chunked", 16384, 5120, columns, tile_bytes=528 * mib, keep_logits_bytes=6 * 2**30)
    for rows in (64, 128, 192, 256, 384, 512, 1024):
        for engine in ("chunked", "fused"):
            _head(stage, engine, rows, 5120, 152064, backward=False)


def _head(
    stage: Stage,
    name: str,
    rows: int,
    hidden_size: int,
    columns: int,
    *,
    backward: bool = True,
    **settings: int,
) -> None:
    from megatron_laser.ops import gpu_backend

    before = configure(**settings)
    try:
        hidden, weight, labels = logprob.inputs(Shape(rows, hidden_size, columns, 1), backward)

        def forward() -> torch.Tensor:
            engine = gpu_backend.FORWARD_ENGINES[name]()
            return gpu_backend.linear_logprob(hidden, weight, labels, engine=engine).logprobs

        def both() -> None:
            hidden.grad = weight.grad = None
            forward().sum().backward()

        samples = stage.size(5, 1)
        figures = {"forward_ms": seconds_per_call(forward, samples=samples) * 1e3}
        figures["tflops"] = 2 * rows * hidden_size * columns / figures["forward_ms"] / 1e9
        if backward:
            figures["sum_ms"] = seconds_per_call(both, samples=samples) * 1e3
        stage.note("choice", engine=name, shape=f"{rows} x {hidden_size} x {columns}", **settings, **figures)
    except Exception as error:
        stage.note(
            "choice",
            engine=name,
            rows=rows,
            columns=columns,
            **settings,
            failed=f"{type(error).__name__}: {error}"[:200],
        )
    finally:
        configure(tile_bytes=before.tile_bytes, keep_logits_bytes=before.keep_logits_bytes)
        platform.empty_cache()

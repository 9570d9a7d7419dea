"""What `bench logprob` and `bench score` found: measurements, their table, their figure and their files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laser.benchmarks.measure import Ceilings
from megatron_laser.benchmarks.result import Provenance, Result, aligned
from megatron_laser.model import platform

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#8C6D1F", "#E69F00", "#D55E00", "#AA3377", "#000000", "#999999")


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

    forward_floor, backward_floor: seconds at the measured ceiling of the device. both: forward and backward, timed
    together; backward: that less the forward, since implementations divide the work between them differently.
    peak_bytes: of forward and backward; forward_peak_bytes: of the forward alone. host: seconds until the forward's
    call returns, with an idle device; on a CPU the call itself. note: why it was not timed, or a remark. wrong: it is
    this package's and disagrees with float64; then it has no times.
    """

    shape: Shape
    implementation: str
    forward_floor: float
    backward_floor: float | None
    error: float | None = None
    forward: float | None = None
    backward: float | None = None
    forward_peak_bytes: int | None = None
    peak_bytes: int | None = None
    rate: float | None = None
    both: float | None = None
    host: float | None = None
    note: str = ""
    wrong: bool = False

    def line(self) -> str:
        """What is told of it before the table is complete."""
        return " ".join([*self.cells(), self.note]).strip()

    def cells(self) -> list[str]:
        """Its row of the table, without the note."""
        return [
            f"  {self.implementation}",
            *(_number(self.forward, 1e3), _ratio(self.forward, self.forward_floor)),
            *(_number(self.backward, 1e3), _ratio(self.backward, self.backward_floor)),
            # Three products are the least that any implementation needs for both.
            *(_number(self.both, 1e3), _ratio(self.both, self.backward_floor)),
            *(_number(self.forward_peak_bytes, 2**-20, 1), _number(self.peak_bytes, 2**-20, 1)),
            *(
                _number(self.host, 1e6, 0),
                _number(self.rate, digits=2),
                "-" if self.error is None else f"{self.error:.0e}",
            ),
        ]


def _number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _ratio(value: float | None, floor: float | None) -> str:
    return "-" if value is None or floor is None else f"{value / floor:.2f}"


class Lines:
    """Measurements as JSON lines, each on disk before the next one begins: FOLDER/NAME.jsonl, appended to.

    The first line of a run says where its figures come from.
    """

    def __init__(self, file: Path, provenance: Provenance) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._write({"provenance": asdict(provenance)})

    def add(self, measurement: Measurement) -> None:
        """Append one."""
        self._write(asdict(measurement))

    def _write(self, record: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Report(Result):
    """All measurements of one run; `unit` is TFLOP/s or GB/s of the forward."""

    title: str
    ceilings: Ceilings
    unit: str
    measurements: list[Measurement]

    @property
    def wrong(self) -> list[Measurement]:
        """Implementations of this package that disagree with float64."""
        return [one for one in self.measurements if one.wrong]

    def table(self) -> str:
        """A table for people."""
        ceilings = self.ceilings
        lines = [
            f"{self.title} on {self.provenance}; {ceilings.dtype}, "
            f"ceilings measured here: {ceilings.flops / 1e12:.4g} TFLOP/s, {ceilings.bytes / 1e9:.4g} GB/s",
        ]
        if not platform.has_cuda():
            lines.append(
                "No CUDA device: small shapes and the torch implementations only; this says nothing of GPUs."
            )
        for shape in dict.fromkeys(one.shape for one in self.measurements):
            found = [one for one in self.measurements if one.shape == shape]
            head = [str(shape), "forward ms", "/ floor", "backward ms", "/ floor", "sum ms", "/ 3 prod."]
            head += ["fwd MiB", "peak MiB", "host us", self.unit, "error"]
            table = aligned([head, *(one.cells() for one in found)])
            notes = ["", *(one.note for one in found)]
            lines += ["", *(f"{line}  {note}".rstrip() for line, note in zip(table, notes))]
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write NAME.json and NAME.png."""
        return [self.write_json(folder / f"{name}.json"), plot(self, folder / f"{name}.png")]


def plot(report: Report, path: Path) -> Path:
    """Write the figure; contenders without a time are left out."""
    from megatron_laser.report.plots.style import new_figure, save, styled  # matplotlib: only for a figure

    shapes = list(dict.fromkeys(one.shape for one in report.measurements))
    names = list(dict.fromkeys(one.implementation for one in report.measurements))
    panels = [("forward", "forward_floor")]
    if any(one.backward is not None for one in report.measurements):
        panels.append(("backward", "backward_floor"))
    width = 0.8 / len(names)
    with styled():
        figure, axes = new_figure(len(panels), 1, height=3.4 * len(panels) + 0.8)
        for panel, (field, floor) in zip(axes[:, 0], panels):
            for index, name in enumerate(names):
                found = [
                    (position, getattr(one, field) / getattr(one, floor))
                    for position, shape in enumerate(shapes)
                    for one in report.measurements
                    if one.shape == shape and one.implementation == name and getattr(one, field) is not None
                ]
                panel.bar(
                    [position + (index - (len(names) - 1) / 2) * width for position, _ in found],
                    [ratio for _, ratio in found],
                    width,
                    label=name,
                    hatch="///" if index >= len(_COLOURS) else None,
                    color=_COLOURS[index % len(_COLOURS)],
                )
            panel.axhline(1.0, color="black", linewidth=1.0)
            panel.set_yscale("log")
            panel.set_xticks(range(len(shapes)), [str(shape).replace(" (", "\n(") for shape in shapes])
            panel.set_ylabel(f"{field}: time / floor")
        axes[0, 0].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.01), fontsize=8)
        return save(
            figure,
            path,
            f"{report.title} on {report.ceilings.device}",
            "Lower is better; 1 is the floor at the device's measured ceilings. Groups: rows x hidden x columns.",
        )

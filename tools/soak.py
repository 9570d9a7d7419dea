#!/usr/bin/env python
"""Does a long run grow? Trains a small run and watches memory, open files and threads of its process.

    python tools/soak.py RUN.yaml                     # 300 steps, one process; RUN.yaml has data.validation
    python tools/soak.py RUN.yaml --steps 1000 --markdown soak.md optimizer.lr=1.0e-5

Free heap pages are given back before each reading. Counted after step 50, when caches and pools are filled: resident
memory must grow by less than 2 %, open files and threads not at all. The exit status is 1 otherwise. Checkpoints,
evaluation and rollout dumps are part of the run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SETTLED = 50
LARGEST_GROWTH = 0.02
EVERY = 25
OVERRIDES = (
    "checkpoint.every=20",
    "evaluation.every=25",
    "evaluation.baseline=false",
    "logging.rollouts_every=25",
    "logging.live=off",
)


@dataclass(frozen=True)
class Reading:
    """What the process has after `step`."""

    step: int
    memory_mib: float
    files: int
    threads: int


def soak(run: Path, steps: int, overrides: list[str]) -> list[Reading]:
    """Train and read after every step."""
    from megatron_laser.config import load_config
    from megatron_laser.loop import train
    from megatron_laser.model.platform import trim_host_memory
    from megatron_laser.run.controller import Controller

    readings: list[Reading] = []
    process = psutil.Process()
    record = Controller.record

    def reading(self: Controller, step: int, *arguments: Any) -> str:
        trouble = record(self, step, *arguments)
        gc.collect()
        trim_host_memory(0)  # what the run holds, without the free pages that the heap keeps for reuse
        readings.append(
            Reading(step, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
        )
        return trouble

    Controller.record = reading  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as output:
        settings = [*OVERRIDES, *overrides, f"run.steps={steps}", f"run.output_dir={output}/run"]
        try:
            train(load_config(run, settings))
        finally:
            Controller.record = record  # type: ignore[method-assign]
    return readings


def level(readings: list[Reading], around: int) -> float:
    """Median memory of the ten readings that end at step `around`: single readings jump by a buffer."""
    values = sorted(r.memory_mib for r in readings if around - 10 < r.step <= around)
    return values[len(values) // 2]


def table(readings: list[Reading]) -> str:
    """A Markdown table of every 25th step."""
    rows = ["| step | resident MiB | open files | threads |", "|---:|---:|---:|---:|"]
    rows += [
        f"| {r.step} | {r.memory_mib:.1f} | {r.files} | {r.threads} |"
        for r in readings
        if r.step % EVERY == 0
    ]
    return "\n".join(rows)


def problems(readings: list[Reading]) -> list[str]:
    """What grew, one line each."""
    last = readings[-1].step
    before, after = level(readings, SETTLED), level(readings, last)
    found = []
    if after > before * (1.0 + LARGEST_GROWTH):
        found.append(f"resident memory grew from {before:.1f} to {after:.1f} MiB after step {SETTLED}")
    settled = [r for r in readings if r.step <= SETTLED]
    for name in ("files", "threads"):
        most, now = max(getattr(r, name) for r in settled), getattr(readings[-1], name)
        if now > most:
            found.append(f"{name} grew from {most} to {now} after step {SETTLED}")
    return found


def main() -> None:
    """Parse the command line, run, print the table and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the YAML file of a small run")
    parser.add_argument("overrides", nargs="*", help="settings as section.key=value")
    parser.add_argument("--steps", type=int, default=300, help="at least 100")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 2 * SETTLED:
        parser.error(f"--steps {arguments.steps}: expected {2 * SETTLED} or more")
    readings = soak(arguments.run, arguments.steps, arguments.overrides)
    found = problems(readings)
    growth = level(readings, arguments.steps) / level(readings, SETTLED) - 1.0
    text = (
        f"{table(readings)}\n\nResident memory after step {SETTLED}: {growth:+.2%} by step {arguments.steps} "
        f"(allowed: {LARGEST_GROWTH:.0%})."
    )
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    for problem in found:
        print(f"failed: {problem}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    from megatron_laser.errors import UserError

    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

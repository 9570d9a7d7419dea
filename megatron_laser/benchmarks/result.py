"""How benchmarks tell what they found: a table for people, and a JSON file that says where its figures come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as python_platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from megatron_laser import __version__
from megatron_laser.model import platform

_PACKAGES = ("torch", "megatron-core", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Provenance:
    """What has to be known to measure the same again."""

    command: str
    date: str
    device: str
    machine: str
    threads: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.device}, torch {self.versions['torch']}, {self.threads} thread(s)"


def provenance(**versions: str) -> Provenance:
    """Of this process; `versions`: of what it talks to, which it does not import."""
    found = {"python": python_platform.python_version(), "megatron_laser": __version__, **versions}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Provenance(
        command=command_line(),
        date=date.today().isoformat(),
        device=platform.device_name(),
        machine=processor(),
        threads=torch.get_num_threads(),
        versions=found | {"torch": torch.__version__},  # which build, too
    )


def command_line() -> str:
    """This process's command, as one would type it in the current folder."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        inside = program.resolve().is_relative_to(Path.cwd())
        words = ["python", str(program.resolve().relative_to(Path.cwd()) if inside else program.name)]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def processor() -> str:
    """This machine's CPU, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores" + (f", {names[0]}" if names else "")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, each as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


@dataclass(frozen=True)
class Result:
    """Figures of one benchmark; subclasses add theirs, and a `table`."""

    provenance: Provenance

    def write_json(self, file: Path) -> Path:
        """Write all of it as JSON; makes the folder."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return file

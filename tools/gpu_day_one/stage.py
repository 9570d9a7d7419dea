"""The process of one part: python -m gpu_day_one.stage NAME OUT WORK [--rehearse]."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_day_one.plan import parts
from gpu_day_one.records import Records

# Transformer Engine is not among the wheels that travel; without this its absence is an error on CUDA.
TORCH_LAYERS = "model.layers=torch"


@dataclass(frozen=True)
class Stage:
    """What a part gets. out: for files that are kept; work: for files that are not; rehearse: toy size, on a CPU."""

    name: str
    out: Path
    work: Path
    rehearse: bool
    records: Records

    def note(self, what: str, **fields: Any) -> None:
        """Write a measurement."""
        self.records.note(self.name, what, **({"rehearsal": True} if self.rehearse else {}), **fields)

    def size(self, full: Any, toy: Any) -> Any:
        """`toy` in a rehearsal."""
        return toy if self.rehearse else full


def main() -> None:
    """Run one part; its exceptions end the process, and the runner keeps the end of what it printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    part = next(part for part in parts() if part.full_name == arguments.name)
    import torch

    if (
        not arguments.rehearse
        and not torch.cuda.is_available()
        and part.stage != "env"
        and part.name != "base"
    ):
        sys.exit(
            f"{part.full_name} needs a CUDA device: torch {torch.__version__} sees none (--rehearse runs on a CPU)"
        )
    run: Callable[[Stage], None] = getattr(
        importlib.import_module(f"gpu_day_one.{part.module}"), part.function
    )
    run(Stage(part.full_name, arguments.out, arguments.work, arguments.rehearse, Records(arguments.out)))


if __name__ == "__main__":
    main()

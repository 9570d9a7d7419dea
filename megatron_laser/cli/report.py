"""`megatron-laser report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Output folders, for example a GRPO run and a LaSeR run.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.md and plots/; by default that of the last run.")
    ] = None,
) -> None:
    """Write report.md with plots for one or more runs, beside each other."""
    from megatron_laser.report.run_report import write_report

    typer.echo(f"wrote {write_report(runs, output)}")

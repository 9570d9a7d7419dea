"""`megatron-laser status`: what a run is doing, from another terminal. No torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_laser.run.observed import Observed


def status(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of one or more runs; several are a table.", metavar="RUN..."),
    ],
    as_json: Annotated[
        bool,
        typer.Option("--json", help="JSON instead: an object, or for several runs a list of them."),
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            help="Look again every so many seconds, until no run goes on any more.", metavar="SECONDS"
        ),
    ] = None,
    exit_status: Annotated[
        bool,
        typer.Option(
            "--exit-status",
            help="Exit as the run has: 0 finished, 3 stopped and saved, 2 refused or cannot go on, 1 crashed, 128 + n "
            "ended at once by signal n; 4 it goes on, 5 it ended without saying so (killed). Of several runs: the "
            "first that is not 0.",
        ),
    ] = False,
) -> None:
    """Say whether a run lives, its step and phase, the time that is left, its newest numbers, alarms and checkpoints.

    It reads files only, and may look from any machine that sees them. With --watch and --exit-status it waits for the
    end of a run and exits as that has.
    """
    from megatron_laser.cli.options import require_positive
    from megatron_laser.run.observed import observe
    from megatron_laser.run.observed_view import one_run, table

    if watch is not None:
        require_positive("--watch", watch)
    while True:
        found = [observe(run) for run in runs]
        if watch is not None and sys.stdout.isatty() and not as_json:
            typer.echo("\x1b[2J\x1b[H", nl=False)
        if as_json:
            values = [one.as_json() for one in found]
            typer.echo(json.dumps(values[0] if len(values) == 1 else values))
        elif len(found) == 1:
            typer.echo("\n".join(one_run(found[0])))
        else:
            typer.echo("\n".join(table(found)))
        if watch is None or not any(one.goes_on for one in found):
            break
        sys.stdout.flush()
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            break
    raise typer.Exit(_worst(found) if exit_status else 0)


def _worst(found: Sequence[Observed]) -> int:
    return next((one.exit_status for one in found if one.exit_status), 0)

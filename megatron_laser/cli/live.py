"""`megatron-laser stacks` and `megatron-laser profile`: what may be asked of a run while it goes on. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SHOWN = 16

LiveRun = Annotated[Path, typer.Argument(help="The output folder of a run that goes on.", metavar="RUN")]
Deadline = Annotated[
    float,
    typer.Option(help="Seconds to wait for answers; shared file systems may take a minute to show a file."),
]


def stacks(run: LiveRun, deadline: Deadline = 60.0) -> None:
    """Have every rank of a live run write the Python stacks of its threads to RUN/stacks; exit status 1 if one did not.

    A rank whose main thread hangs in a collective or a kernel answers, too; one that is stopped, or gone, does not.
    """
    from megatron_laser.cli.options import require_positive
    from megatron_laser.observability.control import ask_for_stacks

    require_positive("--deadline", deadline)
    try:
        found = ask_for_stacks(run, deadline=deadline)
    except (LookupError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    for rank, phase in list(found.phases.items())[:_SHOWN]:
        typer.echo(f"rank {rank}: {phase}")
    if len(found.phases) > _SHOWN:
        typer.echo(f"and {len(found.phases) - _SHOWN} more")
    for one in found.silent:
        typer.echo(
            f"rank {one.rank}: no answer within {deadline:g} s (process {one.pid} on {one.host}); if it lives, "
            f"`kill -QUIT {one.pid}` there prints its stacks into its log",
            err=True,
        )
    typer.echo(
        f"stacks of {len(found.phases)} of {len(found.phases) + len(found.silent)} ranks: {found.folder}"
    )
    raise typer.Exit(1 if found.silent else 0)


def profile(
    run: LiveRun,
    steps: Annotated[int, typer.Option(min=1, help="Steps that the window lasts.")] = 1,
    deadline: Deadline = 60.0,
) -> None:
    """Have a live run profile its next steps, on the ranks of its logging.profile.ranks, into RUN/profile.

    The window begins at the next step; exit status 1 if the run did not hear of it.
    """
    from megatron_laser.cli.options import require_positive
    from megatron_laser.observability.control import ask_for_window

    require_positive("--deadline", deadline)
    try:
        heard = ask_for_window(run, steps, deadline=deadline)
    except (LookupError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if heard:
        typer.echo(
            f"a window of {steps} step{'' if steps == 1 else 's'} begins with the next step: {run}/profile"
        )
        return
    typer.echo(
        f"rank 0 did not answer within {deadline:g} s; `megatron-laser stacks {run}` may say why", err=True
    )
    raise typer.Exit(1)

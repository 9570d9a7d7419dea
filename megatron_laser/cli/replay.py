"""`megatron-laser replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import prepare_process


def replay(
    dump: Annotated[Path, typer.Argument(help="A folder such as OUTPUT_DIR/bad_steps/step_12.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="A Hugging Face folder or a checkpoint's step folder; by default the newest checkpoint that "
            "the dump names, else the initial model."
        ),
    ] = None,
) -> None:
    """Run one batch that a training run skipped, alone on one process; exit status 1 if it is bad again."""
    prepare_process("WARNING", is_main=True)
    from megatron_laser.model.transformer_engine import settle

    settle("torch")  # a run that asks for Transformer Engine is still refused with the reason
    from megatron_laser.run.replay import replay as run

    result = run(dump, weights)
    typer.echo("\n".join(result.lines))
    raise typer.Exit(1 if result.bad else 0)

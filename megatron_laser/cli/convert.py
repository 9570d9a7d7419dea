"""`megatron-laser convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import prepare_process


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A checkpoint such as RUN/checkpoints/step_00000120, or a Hugging Face folder."),
    ],
    target: Annotated[
        Path,
        typer.Argument(help="A new folder; for a checkpoint the run's checkpoint folder, RUN/checkpoints."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="From a checkpoint: the Hugging Face folder that the run started from; by default model.path of "
            "the run's config.yaml."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="To a checkpoint: the run's model.dtype, float32 or bfloat16; by default config.json's."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="From a checkpoint: compare its files with their checksums first.")
    ] = True,
) -> None:
    """Turn a checkpoint of any parallel layout into a Hugging Face folder, or such a folder into a checkpoint.

    Both ways on CPU, in one process and tensor by tensor. A run starts from a converted checkpoint (step 0, fresh
    optimizer) as it would resume.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype}: expected float32 or bfloat16")
    prepare_process("WARNING", is_main=True)
    from megatron_laser.model.transformer_engine import settle

    settle("torch")
    from megatron_laser.cli.conversion import convert as run

    typer.echo(f"wrote {run(source, target, model=model, dtype=dtype, verify=verify)}")

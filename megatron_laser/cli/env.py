"""`megatron-laser env`."""

from __future__ import annotations

import typer


def env(
    sglang_python: str = typer.Option(
        "", help="The servers' interpreter; default: the one that rollout.sglang.python defaults to."
    ),
) -> None:
    """Print versions on both sides, devices, which parts fail to import, and which weight syncs can work here."""
    from megatron_laser.cli.environment import describe
    from megatron_laser.config.schema.rollout import SglangConfig

    for name, value in describe(SglangConfig(python=sglang_python or None)).items():
        typer.echo(f"{name:28s} {value}")

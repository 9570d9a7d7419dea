"""`megatron-laser config`: a configuration shown, compared, and begun. `show` and `diff` need no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides

app = typer.Typer(
    help="Show a configuration and where its values come from, compare two, or write a first one.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_Either = Annotated[str, typer.Argument(help="A YAML file, or a run's output folder.", show_default=False)]


@app.command("show")
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    origins: Annotated[
        bool, typer.Option("--origins", help="A comment behind each value: where it was given.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Defaults, too.")] = False,
) -> None:
    """Print the resolved settings as YAML: those that a file, an override or a variable gave, paths absolute.

    What is printed is a configuration again, equal to the one that was read.

    megatron-laser config show examples/tiny_sum/laser.yaml optimizer.lr=1e-4 --origins
    """
    from megatron_laser.config.loading import load_with_places
    from megatron_laser.config.showing import shown

    typer.echo(shown(load_with_places(config, overrides or []), every=every, origins=origins), nl=False)


@app.command("diff")
def diff(a: _Either, b: _Either) -> None:
    """Print the settings that differ, one line each: optimizer.lr  1e-06 -> 2e-06

    Defaults count: a setting that one file leaves out is compared by its default. Exit status: 0 the same, 1 they
    differ, 2 one cannot be read.

    megatron-laser config diff examples/qwen2.5_7b/grpo.yaml examples/qwen2.5_7b/laser.yaml
    """
    from megatron_laser.config.comparing import compare, read_either

    found = compare(read_either(a), read_either(b))
    for line in found.lines():
        typer.echo(line)
    if found:
        raise typer.Exit(1)

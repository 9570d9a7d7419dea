"""`megatron-laser config`: a configuration shown, compared, and begun. `show` and `diff` need no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides, SetFiles

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
    set_files: SetFiles = None,
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

    loaded = load_with_places(config, overrides or [], set_files or [])
    typer.echo(shown(loaded, every=every, origins=origins), nl=False)


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


@app.command("init")
def init(
    model: Annotated[Path, typer.Argument(help="The base model's Hugging Face folder.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Training problems, .jsonl or .parquet.", show_default=False)],
    validation: Annotated[
        Path | None, typer.Option(help="Problems that are evaluated during the run.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Problems that are evaluated at its end.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; it is never overwritten.")
    ] = Path("laser.yaml"),
    prompt_key: Annotated[
        str | None, typer.Option(help="Column with the problem; by default found by its name.")
    ] = None,
    answer_key: Annotated[
        str | None, typer.Option(help="Column with the reference answer; by default found by its name.")
    ] = None,
    reward: Annotated[
        str, typer.Option(help="reward.function: a registered name, or path/to/file.py:function.")
    ] = "math_verify",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Measure laser.ref_logprob with a small sample of responses, where the model is small enough.",
        ),
    ] = True,
) -> None:
    """Write a first configuration for a model and data: what can be looked up or measured, and what is left to do.

    megatron-laser config init models/Qwen2.5-0.5B data/train.jsonl --validation data/validation.jsonl -o run.yaml
    """
    from megatron_laser.cli.starting_facts import find_columns, look
    from megatron_laser.cli.starting_file import refuse_existing, write_starting_file
    from megatron_laser.rewards.registry import locate_reward

    refuse_existing(output)
    locate_reward(reward)  # that it is there; `check` tries it
    columns = find_columns(data, prompt_key, answer_key)
    for more in (validation, test):
        if more is not None:
            find_columns(more, columns.prompt, columns.answer)
    typer.echo(f"{data}: the problem is in {columns.prompt!r}, the answer in {columns.answer!r}")
    facts = look(model, data, columns, measure=measure, say=typer.echo)
    write_starting_file(output, facts, data, validation, test, reward)
    typer.echo(f"wrote {output}")
    if facts.score.ref_logprob is None:
        typer.echo(f"left to do: laser.ref_logprob ({facts.score.missing}); the file's top says how")
    typer.echo(f"next: megatron-laser check {shlex.quote(str(output))}")

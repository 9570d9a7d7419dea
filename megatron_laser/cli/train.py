"""`megatron-laser train`, and its dry run, which needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides, SetFiles, prepare_process

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_laser.config import RunConfig


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    set_files: SetFiles = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved run and stop: no weights, no data, no process group. "
            "Exit status 2: it would not start.",
        ),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(help="With --dry-run: the number of processes; by default the smallest valid one."),
    ] = None,
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option(
            help="With --dry-run: memory of one GPU that the sum must fit; default: 79.1, an H100's."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Move an existing run.output_dir aside (to NAME.old-1) and start anew.")
    ] = False,
    change: Annotated[
        bool,
        typer.Option(
            help="Go on with other settings of what is learned (docs/changing.md); run.json says since which step."
        ),
    ] = False,
) -> None:
    """Train. One process: megatron-laser train examples/tiny_sum/laser.yaml

    Several:       torchrun --nproc-per-node 8 -m megatron_laser train RUN.yaml parallel.tensor=4
    """
    from megatron_laser.config import check_layout, load_config, read_architecture, resolve_plan
    from megatron_laser.config.process_environment import is_main_process, place_in_run

    loaded = load_config(config, overrides or [], set_files or [])
    if dry_run:
        from rich.console import Console

        from megatron_laser.batching.expected import balance_lines
        from megatron_laser.config.plan.memory import GPU_MEMORY_GIB
        from megatron_laser.config.plan.view import render_plan
        from megatron_laser.data.epochs import epoch_words, with_most_steps

        _check_function(loaded)
        given, loaded = loaded, with_most_steps(loaded)
        available = GPU_MEMORY_GIB if gpu_memory_gib is None else gpu_memory_gib
        if not available > 0:
            raise typer.BadParameter(f"--gpu-memory-gib {available:g}: expected more than 0")
        plan = resolve_plan(loaded, world_size, available)
        console = Console(soft_wrap=not sys.stdout.isatty())
        console.print(render_plan(plan, balance_lines(plan)))
        if words := epoch_words(given, loaded.run.steps):
            print(f"{words} at most, by the rows of data.train; problems that cannot be used do not count")
        refused = _print_folder(loaded, console, overwrite=overwrite, change=change)
        plan.memory.check(available * 2**30)
        if refused:
            raise typer.Exit(2)
        return
    if gpu_memory_gib is not None:
        raise typer.BadParameter("--gpu-memory-gib goes with --dry-run; a run asks its own GPUs")
    if world_size is not None:
        raise typer.BadParameter("--world-size goes with --dry-run; torchrun sets the real one")
    check_layout(loaded, read_architecture(loaded.model.path), place_in_run().world_size)
    is_main = is_main_process()
    from megatron_laser.run.stop_signals import answering_signals

    with answering_signals(speaks=is_main) as signals:
        _run(loaded, overwrite=overwrite, change=change, is_main=is_main)
    if signals.stopped:
        raise typer.Exit(signals.exit_status)
    if is_main:
        from megatron_laser.observability.best_effort import print_line

        report = Path(loaded.run.output_dir) / "report.md"
        print_line(f"done: {report}" if report.is_file() else f"done: {report.parent}, without a report.md")


def _run(config: RunConfig, *, overwrite: bool, change: bool, is_main: bool) -> None:
    """What takes its time from the first import on: signals are answered by now."""
    prepare_process(config.logging.level, is_main)
    from megatron_laser.model.transformer_engine import settle

    settle(config.model.layers)
    from megatron_laser.loop import train as run
    from megatron_laser.run.changes import changes_allowed

    with changes_allowed(change):
        run(config, overwrite=overwrite)


def _print_folder(config: RunConfig, console: Console, *, overwrite: bool, change: bool) -> bool:
    """What would be resumed, changed or refused in `run.output_dir`; returns whether the run would be refused."""
    from megatron_laser.run.folder_lines import REFUSED, folder_lines

    lines = list(folder_lines(config, overwrite=overwrite, change=change))
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return any(line.startswith(REFUSED) for line in lines)


def _check_function(config: RunConfig) -> None:
    """Import `rollout.function` and look at its arguments. Raises FunctionSpecError."""
    if config.rollout.function is not None:
        from megatron_laser.rollout.function.loading import load_function

        load_function(config.rollout.function, config.rollout.function_options)

"""`megatron-laser train`, and its dry run, which needs no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides, prepare_process

if TYPE_CHECKING:
    from megatron_laser.config import RunConfig


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved run and stop: no weights, no data, no process group."
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
) -> None:
    """Train. One process: megatron-laser train examples/tiny_sum/laser.yaml

    Several:       torchrun --nproc-per-node 8 -m megatron_laser train RUN.yaml parallel.tensor=4
    """
    from megatron_laser.config import check_layout, load_config, read_architecture, resolve_plan
    from megatron_laser.config.process_environment import is_main_process, place_in_run

    loaded = load_config(config, overrides or [])
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
        Console(soft_wrap=not sys.stdout.isatty()).print(render_plan(plan, balance_lines(plan)))
        if words := epoch_words(given, loaded.run.steps):
            print(f"{words} at most, by the rows of data.train; problems that cannot be used do not count")
        plan.memory.check(available * 2**30)
        return
    if gpu_memory_gib is not None:
        raise typer.BadParameter("--gpu-memory-gib goes with --dry-run; a run asks its own GPUs")
    if world_size is not None:
        raise typer.BadParameter("--world-size goes with --dry-run; torchrun sets the real one")
    check_layout(loaded, read_architecture(loaded.model.path), place_in_run().world_size)
    is_main = is_main_process()
    prepare_process(loaded.logging.level, is_main)
    from megatron_laser.model.transformer_engine import settle

    settle(loaded.model.layers)
    from megatron_laser.loop import train as run

    folder = run(loaded, overwrite=overwrite)
    if is_main:
        from megatron_laser.observability.best_effort import print_line

        print_line(f"done: {folder}/report.md")


def _check_function(config: RunConfig) -> None:
    """Import `rollout.function` and look at its arguments. Raises FunctionSpecError."""
    if config.rollout.function is not None:
        from megatron_laser.rollout.function.loading import load_function

        load_function(config.rollout.function, config.rollout.function_options)

"""The command line. Heavy imports happen inside the commands: `--help` and `--dry-run` need no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_laser import cli_bench, cli_check, cli_serve, cli_testtime
from megatron_laser.cli_errors import Commands

__all__ = ["app", "main", "prepare_process"]

app = typer.Typer(
    cls=Commands,
    name="megatron-laser",
    help="LaSeR training on Megatron-Core: RL in which the model also learns to judge its own answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(cli_bench.app, name="bench")
cli_testtime.register(app)
app.command("check")(cli_check.check)
app.command("serve")(cli_serve.serve)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings as [cyan]section.key=value[/] (YAML values), for example parallel.tensor=2."
    ),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
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

        from megatron_laser.config.memory import GPU_MEMORY_GIB

        available = GPU_MEMORY_GIB if gpu_memory_gib is None else gpu_memory_gib
        if not available > 0:
            raise typer.BadParameter(f"--gpu-memory-gib {available:g}: expected more than 0")
        plan = resolve_plan(loaded, world_size, available)
        Console(soft_wrap=not sys.stdout.isatty()).print(plan.render())
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
        from megatron_laser.observability.extras import say

        say(f"done: {folder}/report.md")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Output folders, for example a GRPO run and a LaSeR run.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.md and plots/; by default that of the last run.")
    ] = None,
) -> None:
    """Write report.md with plots for one or more runs, beside each other."""
    from megatron_laser.observability.report import write_report

    typer.echo(f"wrote {write_report(runs, output)}")


@app.command()
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
    from megatron_laser.replay import replay as run

    result = run(dump, weights)
    typer.echo("\n".join(result.lines))
    raise typer.Exit(1 if result.bad else 0)


@app.command()
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
    from megatron_laser.conversion import convert as run

    typer.echo(f"wrote {run(source, target, model=model, dtype=dtype, verify=verify)}")


@app.command()
def env(
    sglang_python: str = typer.Option(
        "", help="The servers' interpreter; default: the one that rollout.sglang.python defaults to."
    ),
) -> None:
    """Print versions on both sides, devices, which parts fail to import, and which weight syncs can work here."""
    from megatron_laser.config.schema_rollout import SglangConfig
    from megatron_laser.environment import describe

    for name, value in describe(SglangConfig(python=sglang_python or None)).items():
        typer.echo(f"{name:28s} {value}")


def prepare_process(level: str, is_main: bool) -> None:
    """Logging of this process; quiets import-time remarks of libraries about what is optional here."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
    logging.basicConfig(level=level if is_main else "ERROR", format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("megatron.core", "torch.distributed", "httpx"):
        logging.getLogger(noisy).setLevel("ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_laser.config.process_environment import drop_empty_numbers, openmp_threads

    drop_empty_numbers()
    threads = openmp_threads()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point of `megatron-laser` and `python -m megatron_laser`."""
    from megatron_laser.observability.extras import open_standard_streams

    open_standard_streams()
    app()

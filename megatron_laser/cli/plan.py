"""`megatron-laser plan`: memory and time of a run before GPUs are booked, and the layout that is fastest on them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_laser.cli.options import Overrides, SetFiles

if TYPE_CHECKING:
    from megatron_laser.planner.machine import Machine
    from megatron_laser.planner.report import PlanReport
    from megatron_laser.planner.run_file import PlannedRun

_SAY_EVERY = 3.0  # seconds


def plan(
    config: Annotated[
        Path,
        typer.Argument(
            help="The run's YAML file, or a Hugging Face folder or its config.json: a default run around it."
        ),
    ],
    overrides: Overrides = None,
    set_files: SetFiles = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="All GPUs of the run, the servers' among them.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, b200, or a machine file in YAML (docs/planning.md).")
    ] = "h100",
    assumptions: Annotated[
        Path | None, typer.Option(help="YAML file with assumptions to replace, such as lengths of responses.")
    ] = None,
    server_gpus: Annotated[
        int | None,
        typer.Option(min=1, help="As configured: GPUs that only generate; by default half of several nodes."),
    ] = None,
    only_configured: Annotated[
        bool,
        typer.Option(
            "--as-configured", help="Predict the configuration's own layout alone, without a search."
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Layouts that are listed.")] = 8,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the run with the fastest layout as a YAML file, ready to train."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Measure this machine with CONFIG's model (also under torchrun), and write its machine file."
        ),
    ] = None,
) -> None:
    """Predict memory and seconds of a step, and find the fastest layout that fits.

    Needs config.json and the YAML: no GPU, no weights, no data. Nothing of it has been measured on a GPU yet.
    Exit status 2: nothing fits.

    megatron-laser plan examples/qwen2.5_32b/laser.yaml --gpus 64 --gpu h100 model.path=examples/qwen2.5_32b
    """
    from megatron_laser.planner.run_file import read_run

    run = read_run(config, overrides or [], set_files or [])
    if calibrate is not None:
        _calibrate(run, assumptions, calibrate)
        return
    if gpus is None:
        raise typer.BadParameter("--gpus is missing: how many GPUs the run has in all, servers included")
    if write is not None and write.resolve() == config.resolve():
        raise typer.BadParameter(f"--write {write}: that is CONFIG itself, expected another file")
    if only_configured and run.is_default:
        raise typer.BadParameter(
            "--as-configured: a bare model has no layout of its own, expected a run's YAML"
        )
    if only_configured and write is not None:
        raise typer.BadParameter("--write goes with the search; --as-configured makes none")
    from megatron_laser.planner.assumptions import read_assumptions
    from megatron_laser.planner.machine import read_machine
    from megatron_laser.planner.report import make_report, report_json, report_lines

    machine = read_machine(gpu)
    assumed = read_assumptions(run.config, assumptions)
    report = make_report(
        run, gpus, machine, assumed, server_gpus=server_gpus, search=not only_configured, say=_Progress()
    )
    if write is not None:
        _write(report, write, config, gpus, machine)
    if as_json:
        typer.echo(json.dumps(report_json(report), indent=2))
    else:
        for line in report_lines(report, top):
            typer.echo(line)
        if write is not None:
            typer.echo(f"\nwrote {write}: megatron-laser train {write}")
    report.check()


def _calibrate(run: PlannedRun, assumptions: Path | None, target: Path) -> None:
    """Measure on all ranks, write on rank 0."""
    if run.is_default:
        raise typer.BadParameter(
            "--calibrate: expected a run's YAML, whose model and batch sizes are measured"
        )
    from megatron_laser.cli.options import prepare_process
    from megatron_laser.config.process_environment import is_main_process
    from megatron_laser.planner.assumptions import read_assumptions

    assumed = read_assumptions(run.config, assumptions)
    prepare_process(run.config.logging.level, is_main_process())
    from megatron_laser.model.transformer_engine import settle

    settle(run.config.model.layers)
    from megatron_laser.benchmarks.calibration import calibrate, machine_text

    measured = calibrate(run.config, assumed)
    if measured is not None:
        from megatron_laser.files import write_atomically

        write_atomically(target, machine_text(measured))
        typer.echo(f"wrote {target}: megatron-laser plan CONFIG --gpus N --gpu {target}")


def _write(report: PlanReport, target: Path, config: Path, gpus: int, machine: Machine) -> None:
    from megatron_laser.files import write_atomically
    from megatron_laser.planner.run_file import whole_run
    from megatron_laser.planner.words import describe

    best = report.best
    assert best is not None  # a search that finds nothing raises
    head = [
        f"{config} on {gpus} GPUs ({machine.name}), laid out by `megatron-laser plan`:",
        describe(best.candidate) + ".",
        f"Predicted, not measured: {best.step.seconds:.1f} s a step, "
        f"{best.plan.memory.total / 2**30:.1f} of {machine.memory_gib:g} GiB a GPU.",
    ]
    if report.run.default_of:
        head += ["data.train, laser.score_token and laser.ref_logprob stand for yours: set them."]
    write_atomically(target, whole_run(best.plan.config, head))


class _Progress:
    """A line on standard error every few seconds while layouts are searched."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            typer.echo(text, err=True)

"""`megatron-laser sweep`: the same run with several settings, one after another."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_laser.cli.options import ConfigFile, SetFiles, complete_override

STOPPED = 3
"""Exit status of a run, and of a sweep, that was asked to stop and can be gone on with."""


def sweep(
    config: ConfigFile,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            help="A YAML file that lists the runs ({label, overrides} each), and "
            "[cyan]section.key=value[/] for all of them.",
            metavar="[SWEEP.yaml] [OVERRIDES]...",
            autocompletion=complete_override,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="[cyan]section.key=VALUE,VALUE[/]; given several times: every combination.",
            metavar="KEY=VALUES",
        ),
    ] = None,
    set_files: SetFiles = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the sweep, each run in LABEL below it; by default run.output_dir with _sweep behind it."
        ),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="What starts the runs in place of this Python: 'torchrun --nproc-per-node 8'.",
        ),
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End at the first run that fails.")] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the commands, for a scheduler, and run nothing.")
    ] = False,
    results: Annotated[
        bool, typer.Option("--results", help="Only write and print the table of what there is.")
    ] = False,
) -> None:
    """Train one run for each setting, one after another, and compare them in sweep.md and sweep.csv.

    The same command again goes on: finished runs are skipped, one that was stopped continues. Ctrl-C stops the run in
    progress, which saves, and the sweep with it (exit status 3). Exit status 1: a run failed.

    megatron-laser sweep examples/tiny_sum/laser.yaml --set optimizer.lr=1e-4,2e-4 --set laser.tau=0,0.1
    """
    from megatron_laser.cli.sweep_table import markdown, read_states, rows, write_table
    from megatron_laser.cli.sweep_trials import listed, product, shell, trials

    files = [text for text in more or [] if "=" not in text]
    common = [text for text in more or [] if "=" in text]
    if len(files) + bool(settings) != 1:
        raise typer.BadParameter("expected either one SWEEP.yaml or --set section.key=VALUE,VALUE")
    runs = product(settings or []) if settings else listed(Path(files[0]))
    try:
        start = shlex.split(launcher) if launcher else [sys.executable]
    except ValueError as error:
        raise typer.BadParameter(f"--launcher {launcher!r}: {error}") from None
    folder, planned = trials(config, runs, common, output, start, set_files or [])
    if print_only:
        for trial in planned:
            typer.echo(shell(trial.command))
        return
    states = read_states(folder)
    if results:
        table = rows(planned, states)
        write_table(folder, table)
        typer.echo(markdown(table), nl=False)
        return
    with _asked() as asked:
        stopped = _run_all(folder, planned, states, fail_fast, asked)
    table = rows(planned, states)
    write_table(folder, table)
    typer.echo("\n" + markdown(table), nl=False)
    typer.echo(f"wrote {folder}/sweep.md and sweep.csv")
    if stopped:
        typer.echo("stopped; the same command again goes on with what is not finished")
        raise typer.Exit(STOPPED)
    failed = [row["run"] for row in table if row["state"] != "finished"]
    if failed:
        typer.echo(f"not finished: {', '.join(failed)}; the same command again tries them again", err=True)
        raise typer.Exit(1)


def _run_all(
    folder: Path, planned: Sequence[Any], states: dict[str, str], fail_fast: bool, asked: _Asked
) -> bool:
    """Run what is not finished, and note in `states` how each ended; True where it was asked to stop."""
    from megatron_laser.cli.sweep_table import FINISHED, STATES, rows, summary, write_table
    from megatron_laser.cli.sweep_trials import shell
    from megatron_laser.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    for number, trial in enumerate(planned, 1):
        head = f"[{number} of {len(planned)}] {trial.label}"
        if trial.finished:
            typer.echo(f"{head}: finished before, skipped")
            continue
        if asked.yes:  # between two runs
            return True
        typer.echo(f"{head}: {shell(trial.command)}")
        status = _run(trial.command, asked)
        finished = trial.finished or (status == 0 and not asked.yes and trial.says_finished)
        stopped = asked.yes or status == STOPPED or (status == 0 and not finished)
        if trial.finished:
            states.pop(trial.label, None)
        elif finished:
            states[trial.label] = FINISHED
        else:
            states[trial.label] = "stopped" if stopped else f"failed ({_how(status)})"
        write_atomically(folder / STATES, json.dumps(states, indent=1) + "\n")
        table = rows(planned, states)
        write_table(folder, table)
        typer.echo(f"[{number} of {len(planned)}] {summary(table[number - 1])}")
        if stopped:
            return True
        if fail_fast and not finished:
            typer.echo("--fail-fast: the runs behind it were not started", err=True)
            return False
    return False


def _run(command: Sequence[str], asked: _Asked) -> int:
    """Exit status of a run, with this process's output; 3 where it was asked to stop before it began."""
    if asked.yes:
        return STOPPED
    child = subprocess.Popen(command)
    asked.child = child
    if asked.late:  # while it was started
        child.send_signal(asked.late)
    try:
        return child.wait()
    finally:
        asked.child = None


class _Asked:
    """Signals that came. child: which gets those that a terminal does not send to it by itself."""

    def __init__(self) -> None:
        self.yes = False
        self.late: int = 0
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.yes = True
        if self.child is None:  # between two runs, or one is just being started
            self.late = number
        elif number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return  # the terminal has sent it to the run as well
        elif self.child.poll() is None:
            self.child.send_signal(number)


@contextmanager
def _asked() -> Iterator[_Asked]:
    asked = _Asked()
    taken = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's, which the runs inherit
        taken.append(signal.SIGHUP)
    before = {number: signal.signal(number, asked) for number in taken}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"

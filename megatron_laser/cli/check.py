"""The command `check`."""

from __future__ import annotations

import shutil
import time
from typing import Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides, SetFiles, prepare_process

_SAY_EVERY = 5.0  # seconds


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    set_files: SetFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at everything that a run starts from: model folder, tokenizer, data, reward function, disks.

    Needs no GPU, loads no weights and writes nothing; `train` looks at the same before it starts.

    Layout and memory are shown by train --dry-run. Exit status 2: the run would not start.

    megatron-laser check examples/tiny_sum/laser.yaml
    """
    from megatron_laser.config import load_config

    loaded = load_config(config, overrides or [], set_files or [])
    prepare_process("ERROR", is_main=True)
    from megatron_laser.run.preflight import FindingLog, run_preflight
    from megatron_laser.run.preflight.checks import ORDER
    from megatron_laser.run.preflight.finding_log import as_json as to_json
    from megatron_laser.run.preflight.finding_log import lines

    log = FindingLog(stop_at_errors=False)
    run_preflight(loaded, log, _Progress())
    if as_json:
        typer.echo(to_json(log))
    else:
        for line in lines(log, ORDER, shutil.get_terminal_size((120, 24)).columns):
            typer.echo(line)
    if any(finding.level == "error" for finding in log.findings):
        raise typer.Exit(2)


class _Progress:
    """A line every few seconds while prompts are tokenized."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, split: str, done: int, total: int) -> None:
        if time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            typer.echo(f"tokenized {done:,} of {total:,} problems of data.{split}", err=True)

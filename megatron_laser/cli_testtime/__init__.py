"""The test-time commands: eval, score, calibrate. Heavy imports happen inside them, as in `cli`."""

from __future__ import annotations

import typer

from megatron_laser.cli_testtime.calibrate import calibrate
from megatron_laser.cli_testtime.evaluate import evaluate
from megatron_laser.cli_testtime.score import score


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("eval")(evaluate)
    app.command("score")(score)
    app.command("calibrate")(calibrate)

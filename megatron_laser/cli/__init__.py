"""The command line: one file a command, nothing imports it; `options` has what several commands share.

Heavy imports happen inside the commands: `--help` and `--dry-run` need no torch. `conversion` and
`environment` are the work behind `convert` and `env`; `errors` turns errors into messages and exit status 2.
"""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_laser.cli import (
    bench,
    calibrate,
    check,
    config,
    convert,
    env,
    evaluate,
    live,
    metrics,
    plan,
    replay,
    report,
    score,
    serve,
    status,
    sweep,
    train,
    verify,
    view,
)
from megatron_laser.cli.errors import Commands
from megatron_laser.cli.version import show_version

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    name="megatron-laser",
    help="LaSeR training on Megatron-Core: RL in which the model also learns to judge its own answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=show_version,
            help="Print the versions of this package, its commit, Python and what it stands on.",
        ),
    ] = False,
) -> None:
    """LaSeR training on Megatron-Core: RL in which the model also learns to judge its own answers."""
    del version  # printed by its callback, before a command is looked for


app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("report")(report.report)
app.command("eval")(evaluate.evaluate)
app.command("score")(score.score)
app.command("verify")(verify.verify)
app.command("metrics")(metrics.metrics)
app.command("calibrate")(calibrate.calibrate)
app.command("serve")(serve.serve)
app.command("convert")(convert.convert)
app.command("view")(view.view)
app.command("replay")(replay.replay)
app.command("status")(status.status)
app.command("stacks")(live.stacks)
app.command("profile")(live.profile)
app.command("env")(env.env)
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of `megatron-laser` and `python -m megatron_laser`."""
    from megatron_laser.observability.best_effort import open_standard_streams

    open_standard_streams()
    app()

"""The command line: one file a command, nothing imports it; `options` has what several commands share.

Heavy imports happen inside the commands: `--help` and `--dry-run` need no torch. `conversion` and
`environment` are the work behind `convert` and `env`; `errors` turns errors into messages and exit status 2.
"""

from __future__ import annotations

import typer

from megatron_laser.cli import (
    bench,
    calibrate,
    check,
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
    train,
    verify,
    view,
)
from megatron_laser.cli.errors import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    name="megatron-laser",
    help="LaSeR training on Megatron-Core: RL in which the model also learns to judge its own answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train.train)
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
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of `megatron-laser` and `python -m megatron_laser`."""
    from megatron_laser.observability.best_effort import open_standard_streams

    open_standard_streams()
    app()

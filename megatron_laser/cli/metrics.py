"""`megatron-laser metrics`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import prepare_process, require_positive


def metrics(
    source: Annotated[
        Path,
        typer.Argument(
            help="JSON Lines with a score in each row, or the --output of a finished `megatron-laser eval`."
        ),
    ],
    scores: Annotated[
        Path | None,
        typer.Option(
            help="With an evaluation: JSON Lines of another judge's scores: `row` (or `id`), `sample`, `score`, and "
            "`benchmark` where there are several. Without: the evaluation's own scores."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="With an evaluation: only this benchmark; may be given several times."),
    ] = None,
    score_key: Annotated[str, typer.Option(help="Field with the score.")] = "score",
    sigmoid: Annotated[
        bool, typer.Option("--sigmoid", help="Scores are logits (a reward model's): take 1 / (1 + e^-x).")
    ] = False,
    threshold: Annotated[float, typer.Option(help="A response is called right above it.")] = 0.5,
    output: Annotated[Path, typer.Option(help="Folder for results.json, report.md and plots.")] = Path(
        "runs/metrics"
    ),
    reward: Annotated[
        str,
        typer.Option(help="Verifier of rows without a label: math_verify, or as reward.function of a run."),
    ] = "math_verify",
    workers: Annotated[int, typer.Option(help="Grading processes.")] = 2,
    grading_deadline: Annotated[float, typer.Option(help="Seconds to grade one answer.")] = 5.0,
) -> None:
    """Judge scores: F1 (in both conventions), AUROC, ECE, and what votes gain, whoever gave the scores.

    A file: what `megatron-laser score` or `verify` wrote, or any JSON Lines with, in each row, `score` (null: none);
    the label `reward` (or `label`), 1 right and 0 wrong, or a `response` with its reference `answer`, which are then
    graded; the problem as `row`, `id`, `problem` or `prompt`; if known `sample`, `response_ids_length`, `benchmark`.

    Another model's scores of a file:  megatron-laser metrics answers.scored.jsonl

    A reward model's of an evaluation: megatron-laser metrics runs/eval --scores rm.jsonl --sigmoid --threshold 0.5

    A row of rm.jsonl: {"benchmark": "aime24", "row": 0, "sample": 3, "score": 1.25}
    """
    if only and not source.is_dir():
        raise typer.BadParameter("--only is for the folder of an evaluation")
    if scores is not None and not source.is_dir():
        raise typer.BadParameter(
            "--scores is for the folder of an evaluation; the scores of a file stand in its rows"
        )
    if source.is_dir() and scores is None and (sigmoid or score_key != "score"):
        raise typer.BadParameter("--sigmoid and --score-key are for scores in a file; name it with --scores")
    if not math.isfinite(threshold):
        raise typer.BadParameter(f"--threshold {threshold}: expected a finite number")
    require_positive("--workers", workers)
    require_positive("--grading-deadline", grading_deadline)
    prepare_process("WARNING", is_main=True)
    from megatron_laser.report.benchmark_report import overview
    from megatron_laser.rewards import GradingPool, try_reward
    from megatron_laser.testtime.finished import read_finished
    from megatron_laser.testtime.score_report import write_score_report
    from megatron_laser.testtime.scored_rows import ScoreColumn, join_scores, read_scored_file

    if output.resolve() == source.resolve():
        raise typer.BadParameter("--output is the evaluation's own folder, whose results it would replace")
    column = ScoreColumn(score_key, sigmoid)
    if not source.is_dir():
        try_reward(reward, deadline=grading_deadline)
        with GradingPool(workers=workers, deadline=grading_deadline, function=reward) as pool:
            found = read_scored_file(source, column, pool)
        results = write_score_report(
            found.benchmarks,
            output,
            judged=f"Scores: `{score_key}` of `{source}`",
            threshold=threshold,
            missing_is_zero=not found.own_scores,
            lengths_known=found.lengths_known,
            boxes_known=found.boxes_known,
        )
    else:
        finished = read_finished(source, only=only or [])
        own = {one.name: one.records for one in finished}
        results = write_score_report(
            own if scores is None else join_scores(finished, scores, column),
            output,
            judged=f"Responses of `{finished[0].model}` in `{source}`; scores: "
            + ("its own" if scores is None else f"`{score_key}` of `{scores}`"),
            threshold=threshold,
            missing_is_zero=scores is not None,
            seed=finished[0].benchmark.seed,
        )
    typer.echo(overview(results))
    typer.echo(f"wrote {output / 'report.md'}")

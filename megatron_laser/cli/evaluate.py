"""`megatron-laser eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import (
    API_KEY_VARIABLE,
    Batch,
    Beta,
    Concurrency,
    Dtype,
    KeyVariable,
    Model,
    RefLogprob,
    Router,
    ScoreToken,
    StopIds,
    Urls,
    Wait,
    engine_choice,
    model_folder,
    require_positive,
)


def evaluate(
    model: Model,
    benchmarks: Annotated[
        Path,
        typer.Argument(
            help="A benchmark file such as examples/benchmarks.yaml, or one .jsonl or .parquet file of problems.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings as NAME.key=value, for example math500.path=/data/math500.jsonl test.samples=8."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for responses, results.json, report.md and plots.")
    ] = Path("runs/eval"),
    only: Annotated[
        list[str] | None, typer.Option(help="Only this benchmark; may be given several times.")
    ] = None,
    url: Urls = None,
    router: Router = None,
    api_key_env: KeyVariable = API_KEY_VARIABLE,
    dtype: Dtype = "float32",
    batch: Batch = 256,
    concurrency: Concurrency = 256,
    wait: Wait = 60.0,
    score_token: ScoreToken = None,
    ref_logprob: RefLogprob = None,
    beta: Beta = None,
    no_score: Annotated[bool, typer.Option("--no-score", help="Ask for no scores.")] = False,
    prefix_every: Annotated[
        int | None,
        typer.Option(
            help="Also score the prefixes of responses, behind each so many tokens; 0: none. By default where the "
            "training run's readout of prefixes has its places, if there is one."
        ),
    ] = None,
    prefix_delimiter: Annotated[
        str | None, typer.Option(help="The same behind each such text, as $'\\n\\n' ends a paragraph.")
    ] = None,
    stop_below: Annotated[
        str | None,
        typer.Option(
            help="Scores of prefixes, as 0.1,0.2,0.3: what ending a response at the first lower one would save, and "
            "cost. Computed from the whole responses.",
            metavar="SCORE[,SCORE...]",
        ),
    ] = None,
    end_early: Annotated[
        bool,
        typer.Option(
            "--end-early", help="End generation itself at the one score of --stop-below: tokens are saved."
        ),
    ] = False,
    stop_token_id: StopIds = None,
    workers: Annotated[int, typer.Option(help="Grading processes.")] = 2,
    grading_deadline: Annotated[float, typer.Option(help="Seconds to grade one answer.")] = 5.0,
    regrade: Annotated[
        bool, typer.Option("--regrade", help="Grade and score the saved responses again.")
    ] = False,
    deadline: Annotated[float, typer.Option(help="Seconds for one benchmark.")] = 86400.0,
) -> None:
    """Evaluate a model on benchmarks: accuracy, votes by the score, and how well the score knows right from wrong.

    Every response is on disk as it arrives: the same command goes on after a kill, and gives the same numbers again
    from what is saved.

    The small example:  megatron-laser eval runs/tiny_sum/laser examples/tiny_sum/test.jsonl test.samples=8

    The paper's five:   megatron-laser eval MODEL examples/benchmarks.yaml --url http://127.0.0.1:30000

    Prefixes:           megatron-laser eval MODEL FILE --prefix-every 100 --stop-below 0.1,0.2,0.3
    """
    from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
    from megatron_laser.evaluation.prefix_rule import AskedPrefixes
    from megatron_laser.evaluation.prefix_summary import StopBelow

    stop = StopBelow.parse(stop_below, end_early=end_early)
    asked = AskedPrefixes(prefix_every, prefix_delimiter)
    if no_score and (stop_below is not None or prefix_every or prefix_delimiter):
        raise typer.BadParameter("--no-score asks for no scores, of prefixes neither: leave it out")
    choice = engine_choice(url, router, api_key_env, dtype, batch, concurrency, wait)
    folder = model_folder(
        model, score_token, ref_logprob, beta, stop_token_id, with_score=not no_score, prefixes=asked
    )
    if stop_below is not None and folder.prefix is None:
        raise typer.BadParameter(
            "--stop-below: no prefixes are scored; say where with --prefix-every or --prefix-delimiter, and with "
            "--score-token and --ref-logprob what is read if the model's run does not say"
        )
    chosen = load_benchmarks(benchmarks, overrides or [], only=only or [], from_run=folder.from_run)
    for name, value in (
        ("--workers", workers),
        ("--grading-deadline", grading_deadline),
        ("--deadline", deadline),
    ):
        require_positive(name, value)
    from megatron_laser.evaluation.benchmarks.run import evaluate_benchmarks

    results = evaluate_benchmarks(
        folder,
        chosen,
        choice,
        output,
        deadline=deadline,
        workers=workers,
        grading_deadline=grading_deadline,
        regrade=regrade,
        say=typer.echo,
        stop=stop,
    )
    from megatron_laser.report.benchmark_report import overview

    typer.echo(overview(results))

"""`megatron-laser calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import (
    API_KEY_VARIABLE,
    Batch,
    Concurrency,
    Dtype,
    KeyVariable,
    Router,
    StopIds,
    SystemPrompt,
    TemplateArguments,
    Urls,
    Wait,
    chat_options,
    engine_choice,
    model_folder,
    require_positive,
)


def calibrate(
    model: Annotated[Path, typer.Argument(help="The base model's Hugging Face folder.")],
    data: Annotated[
        Path, typer.Argument(help="Training problems, .jsonl or .parquet: no score token may occur in them.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for laser.yaml (ready to paste) and calibration.json.")
    ] = Path("runs/calibration"),
    token: Annotated[
        list[str] | None,
        typer.Option(help="Measure this token or id instead of proposing some; may be given several times."),
    ] = None,
    candidates: Annotated[int, typer.Option(help="Tokens that are proposed and measured.")] = 8,
    problems: Annotated[int, typer.Option(help="Problems that are answered.")] = 150,
    samples: Annotated[int, typer.Option(help="Responses to each.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 8192,
    max_std: Annotated[
        float, typer.Option(help="Refuse tokens whose log-prob has a larger standard deviation, in nats.")
    ] = 1.0,
    beta: Annotated[
        float, typer.Option(help="The beta that is wanted; a larger one is proposed where Z - 1 needs it.")
    ] = 0.1,
    prompt_key: Annotated[str, typer.Option(help="Column with the problem.")] = "problem",
    answer_key: Annotated[str, typer.Option(help="Column with the reference answer.")] = "answer",
    prompt_suffix: Annotated[
        str, typer.Option(help="Behind each problem, as in training.")
    ] = " Please reason step by step, and put your final answer within \\boxed{}.",
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="As in training.")
    ] = True,
    chat_template_argument: TemplateArguments = None,
    system_prompt: SystemPrompt = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of the choice of problems, and of sampling in this process.", min=0, max=2**63 - 1
        ),
    ] = 1,
    url: Urls = None,
    router: Router = None,
    api_key_env: KeyVariable = API_KEY_VARIABLE,
    dtype: Dtype = "float32",
    batch: Batch = 256,
    concurrency: Concurrency = 256,
    wait: Wait = 60.0,
    stop_token_id: StopIds = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds for sampling, and for each token's scores.")
    ] = 3600.0,
) -> None:
    """Find a score token for a new base model, and measure its constants for `laser` in the configuration.

    Proposes tokens that no text of the data and no response contains, samples responses, and measures each token's
    log-prob behind them: c_ref is the mean, which must hardly vary. Exit status 1 where no token will do; the
    message says why and what to do.

    megatron-laser calibrate models/Qwen2.5-7B data/train.parquet --output runs/calibration
    """
    for name, value in (
        ("--candidates", candidates),
        ("--problems", problems),
        ("--samples", samples),
        ("--max-new-tokens", max_new_tokens),
        ("--max-std", max_std),
        ("--beta", beta),
        ("--deadline", deadline),
    ):
        require_positive(name, value)
    choice = engine_choice(url, router, api_key_env, dtype, batch, concurrency, wait)
    folder = model_folder(model, None, None, None, stop_token_id, with_score=False)
    from megatron_laser.testtime.calibration import CalibrationSettings, calibrate_model

    settings = CalibrationSettings(
        tokens=tuple(token or ()),
        candidates=candidates,
        problems=problems,
        samples=samples,
        max_new_tokens=max_new_tokens,
        max_std=max_std,
        beta=beta,
        prompt_key=prompt_key,
        answer_key=answer_key,
        prompt_suffix=prompt_suffix,
        apply_chat_template=chat_template,
        options=chat_options(chat_template_argument, system_prompt, template=chat_template, from_run={}),
        seed=seed,
        deadline=deadline,
    )
    result = calibrate_model(folder, data, choice, settings, say=typer.echo)
    typer.echo(result.text())
    result.write(output)
    if result.chosen is None:
        raise typer.Exit(1)
    typer.echo(f"wrote {output / 'laser.yaml'} and {output / 'calibration.json'}")

"""`megatron-laser verify`."""

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
    Model,
    Router,
    StopIds,
    Urls,
    Wait,
    chat_options,
    engine_choice,
    model_folder,
    require_positive,
)


def verify(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            help="The --output of a finished `megatron-laser eval`, of this model or another; or JSON Lines with "
            "`problem` and `response`."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default SOURCE.verified.jsonl.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of an evaluation: only this benchmark; may be given several times."),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help="Text file with the prompt, in which {problem} and {response} are filled in."),
    ] = None,
    right_pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression of a verdict that says right; of both the last counts."),
    ] = None,
    wrong_pattern: Annotated[
        str | None, typer.Option(help="Regular expression of a verdict that says wrong.")
    ] = None,
    verdicts: Annotated[
        int, typer.Option(help="Verdicts on each response; the score is the share that says right.")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest verdict.")] = 2048,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.", min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.", min=0, max=2**63 - 1)] = 1234,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Send prompts through the chat template or not; by default as in training, else yes.",
        ),
    ] = None,
    url: Urls = None,
    router: Router = None,
    api_key_env: KeyVariable = API_KEY_VARIABLE,
    dtype: Dtype = "float32",
    batch: Batch = 256,
    concurrency: Concurrency = 256,
    wait: Wait = 60.0,
    stop_token_id: StopIds = None,
    deadline: Annotated[float, typer.Option(help="Seconds for all verdicts.")] = 86400.0,
) -> None:
    """Ask a model in a second prompt whether responses are right: the verifier of models without a trained score.

    The prompt asks for a box with Yes or No behind reasoning; `--template` and the two patterns change that. A verdict
    that says neither is counted. Every verdict is on disk as it arrives: the same command goes on after a kill.

    Its own answers:     megatron-laser verify models/Qwen2.5-7B runs/eval/base --url http://127.0.0.1:30000

    Tables and figures:  megatron-laser metrics runs/eval/base.verified.jsonl
    """
    for name, value in (
        ("--verdicts", verdicts),
        ("--max-new-tokens", max_new_tokens),
        ("--top-p", top_p),
        ("--deadline", deadline),
    ):
        require_positive(name, value)
    if only and not source.is_dir():
        raise typer.BadParameter("--only is for the folder of an evaluation")
    choice = engine_choice(url, router, api_key_env, dtype, batch, concurrency, wait)
    folder = model_folder(model, None, None, None, stop_token_id, with_score=False)
    from megatron_laser.testtime.self_verification import VerdictSettings, read_questions, verify_file
    from megatron_laser.testtime.verdicts import RIGHT_PATTERN, WRONG_PATTERN, VerdictForm, read_template

    form = VerdictForm(
        read_template(template),
        RIGHT_PATTERN if right_pattern is None else right_pattern,
        WRONG_PATTERN if wrong_pattern is None else wrong_pattern,
    )
    chat = folder.from_run.get("apply_chat_template", True) if chat_template is None else chat_template
    settings = VerdictSettings(
        form,
        verdicts=verdicts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        apply_chat_template=chat,
        options=chat_options(None, None, template=chat, from_run=folder.from_run),
    )
    target = output or source.absolute().with_name(f"{source.absolute().name}.verified.jsonl")
    rows = read_questions(source, only=only or ())
    found = verify_file(folder, rows, target, choice, settings, deadline=deadline)
    typer.echo(
        f"{found['responses']:.0f} responses, {found['verdicts']:.0f} verdicts, {found['unparsable']:.0f} of them say "
        f"neither ({found['without_verdict']:.0f} responses without a verdict); wrote {target}"
    )
    if found["labelled"]:
        typer.echo(
            f"accuracy on right responses {found['accuracy_correct']:.3f}, on wrong ones "
            f"{found['accuracy_incorrect']:.3f}, F1 {found['f1']:.3f}; F1 {found['strict_f1']:.3f} where a response "
            "without a verdict is called wrong"
        )

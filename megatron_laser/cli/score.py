"""`megatron-laser score`: a file, or a proxy that samples, scores and votes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    SystemPrompt,
    TemplateArguments,
    Urls,
    Wait,
    chat_options,
    engine_choice,
    model_folder,
    require_positive,
)

if TYPE_CHECKING:
    from megatron_laser.data import ChatOptions
    from megatron_laser.testtime import ModelFolder


def score(
    model: Model,
    source: Annotated[
        Path | None,
        typer.Argument(
            help="JSON Lines: prompt, messages or prompt_ids, and response or response_ids. Or the --output of a "
            "finished `megatron-laser eval`, of this model or another: its responses."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write; by default SOURCE with .scored before the suffix (a folder: SOURCE.scored.jsonl)."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of an evaluation: only this benchmark; may be given several times."),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Answer OpenAI chat requests instead: sample k, score, vote."),
    ] = False,
    host: Annotated[
        str, typer.Option(help="With --serve: address to listen on. Others than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --serve: port to listen on; 0: a free one.")] = 8100,
    k: Annotated[int, typer.Option(help="With --serve: answers to each request, where it names no k.")] = 8,
    max_k: Annotated[int, typer.Option(help="With --serve: the most that a request may ask for.")] = 64,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="With --serve: longest answer; by default the training run's, else 8192."),
    ] = None,
    serve_key_env: Annotated[
        str, typer.Option(help="With --serve: environment variable with the key that clients must send.")
    ] = "MEGATRON_LASER_PROXY_KEY",
    model_name: Annotated[
        str | None, typer.Option(help="With --serve: the model's name; by default the folder's.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Send prompts through the chat template or not; by default as in training, else yes.",
        ),
    ] = None,
    prompt_suffix: Annotated[
        str | None,
        typer.Option(help="Behind each prompt; by default as in training, else nothing."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Score by log pi(response) - log pi_ref(response) against this folder's model (the implicit reward) "
            "instead of by the score token; both models are loaded in this process, one after the other."
        ),
    ] = None,
    chat_template_argument: TemplateArguments = None,
    system_prompt: SystemPrompt = None,
    end_token_id: Annotated[
        int | None,
        typer.Option(help="What stands behind a response given as text; by default MODEL's first EOS id."),
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
    stop_token_id: StopIds = None,
    deadline: Annotated[float, typer.Option(help="Seconds for one batch, or for one request.")] = 600.0,
) -> None:
    """Score given answers with the model's own judgement, or serve answers that it has voted for.

    A file:    megatron-laser score runs/tiny_sum/laser answers.jsonl

    An evaluation, perhaps of another model: megatron-laser score MODEL runs/eval --output scores.jsonl; how good these
    scores are says `megatron-laser metrics scores.jsonl`. Of a later checkpoint over the initial model's answers it is
    how far c_ref has moved.

    The implicit reward, and how it goes with length: megatron-laser score MODEL runs/eval --reference models/BASE

    A server:  megatron-laser score runs/tiny_sum/laser --serve --port 8100, then any OpenAI client with base_url
    http://127.0.0.1:8100/v1; extra_body={"k": 16} asks for 16 samples. The answer's score is in choices[0].score.
    """
    if serve == (source is not None):
        raise typer.BadParameter("give either a JSON Lines file or --serve")
    if only and (source is None or not source.is_dir()):
        raise typer.BadParameter("--only is for the folder of an evaluation")
    if reference is not None and (serve or url):
        raise typer.BadParameter(
            "--reference: both models are loaded in this process; leave --serve and --url out"
        )
    require_positive("--deadline", deadline)
    choice = engine_choice(url, router, api_key_env, dtype, batch, concurrency, wait)
    folder = model_folder(model, score_token, ref_logprob, beta, stop_token_id, with_score=reference is None)
    template = folder.from_run.get("apply_chat_template", True) if chat_template is None else chat_template
    suffix = folder.from_run.get("prompt_suffix", "") if prompt_suffix is None else prompt_suffix
    options = chat_options(chat_template_argument, system_prompt, template=template, from_run=folder.from_run)
    # What nobody says of the prompts of an evaluation is as it was there.
    told = bool(folder.from_run) or chat_template_argument is not None or system_prompt is not None
    if reference is not None:
        assert source is not None
        if template:
            _check(folder, options)
        _log_ratios(
            *(folder, reference, source, output, only, chat_template, prompt_suffix, dtype, end_token_id),
            options=options,
            told=told,
        )
        return
    folder.require_score()
    if template:
        _check(folder, options)
    if serve:
        from megatron_laser.testtime.proxy import ProxySettings, run_proxy

        settings = ProxySettings(
            model_name=model_name or (model.absolute().name),
            host=host,
            port=port,
            api_key=os.environ.get(serve_key_env) or None,
            k=k,
            max_k=max_k,
            max_new_tokens=max_new_tokens or folder.from_run.get("max_new_tokens", 8192),
            apply_chat_template=template,
            prompt_suffix=suffix,
            options=options,
            deadline=deadline,
        )
        run_proxy(folder, choice, settings, say=typer.echo)
        return
    from megatron_laser.evaluation.pinned_weights import PinnedWeights
    from megatron_laser.testtime import Scorer
    from megatron_laser.testtime.scoring import read_answers, score_file

    assert source is not None
    if source.is_dir():
        from megatron_laser.testtime.evaluation_answers import read_evaluation_answers

        answers = read_evaluation_answers(
            folder,
            source,
            only=only or (),
            apply_chat_template=chat_template
            if chat_template is not None
            else folder.from_run.get("apply_chat_template"),
            prompt_suffix=folder.from_run.get("prompt_suffix") if prompt_suffix is None else prompt_suffix,
            options=options if told else None,
            end_token_id=end_token_id,
        )
        target = output or source.absolute().with_name(f"{source.absolute().name}.scored.jsonl")
    else:
        answers = read_answers(
            folder,
            source,
            apply_chat_template=template,
            prompt_suffix=suffix,
            end_token_id=end_token_id,
            options=options,
        )
        target = output or source.with_name(f"{source.stem}.scored{source.suffix}")
    with PinnedWeights(choice, folder, deadline=deadline, identify=False) as weights:
        counts = score_file(
            Scorer(weights.engine(), folder, end_token_id=end_token_id),
            answers,
            target,
            deadline=deadline,
            batch=batch,
            check=weights.check,
        )
    typer.echo(
        f"{counts['rows']:.0f} rows, {counts['scored']:.0f} with a score (mean {counts['score_mean']:.3f}), "
        f"{counts['right']:.0f} called right; wrote {target}"
    )
    if counts["scored"] and folder.kind != "scaled_logratio":
        typer.echo(
            f"log-odds of the first of {1 + len(folder.more_tokens)} tokens: mean {counts['zc_mean']:.3f}, standard "
            f"deviation {counts['zc_std']:.3f}"
        )
    elif counts["scored"]:
        typer.echo(
            f"log-prob of the score token: mean {counts['zc_mean']:.3f}, standard deviation {counts['zc_std']:.3f} nats"
            f" (ref_logprob {folder.ref_logprob:g})"
        )
    if "zc_change" in counts:
        typer.echo(
            f"change against the source's own log-probs: {counts['zc_change']:+.3f} nats (standard deviation "
            f"{counts['zc_change_std']:.3f}); where the answers are the initial model's, so far has c_ref moved"
        )


def _check(model: ModelFolder, options: ChatOptions) -> None:
    from megatron_laser.data import check_chat_options

    check_chat_options(model.tokenizer, options, section="score")


def _log_ratios(
    model: ModelFolder,
    reference_path: Path,
    source: Path,
    output: Path | None,
    only: list[str] | None,
    chat_template: bool | None,
    prompt_suffix: str | None,
    dtype: str,
    end_token_id: int | None,
    *,
    options: ChatOptions,
    told: bool,
) -> None:
    """With `--reference`."""
    from megatron_laser.model import platform
    from megatron_laser.model.platform import DTYPES
    from megatron_laser.testtime.evaluation_answers import read_evaluation_sequences
    from megatron_laser.testtime.log_ratio import check_reference, response_logprobs, write_log_ratios
    from megatron_laser.testtime.scoring import read_answers

    reference = model_folder(reference_path, None, None, None, None, with_score=False)
    check_reference(model, reference)
    template = model.from_run.get("apply_chat_template") if chat_template is None else chat_template
    suffix = model.from_run.get("prompt_suffix") if prompt_suffix is None else prompt_suffix
    if source.is_dir():
        answers = read_evaluation_sequences(
            model,
            source,
            only=only or (),
            apply_chat_template=template,
            prompt_suffix=suffix,
            options=options if told else None,
        )
    else:
        answers = read_answers(
            model,
            source,
            apply_chat_template=True if template is None else template,
            prompt_suffix=suffix or "",
            end_token_id=end_token_id,
            options=options,
        )
    target = output or source.absolute().with_name(f"{source.absolute().name}.log_ratio.jsonl")
    policy, base = (
        response_logprobs(
            folder.path, answers.pairs, dtype=DTYPES[dtype], device=platform.device(), say=typer.echo
        )
        for folder in (model, reference)
    )
    found = write_log_ratios(answers.rows, answers.pairs, policy, base, target)
    typer.echo(
        f"{found['responses']:.0f} responses: log-ratio {found['mean']:.3f} (standard deviation {found['std']:.3f}) "
        f"nats; with length: Spearman {found['spearman_length']:.3f}, Pearson {found['pearson_length']:.3f}, per token "
        f"Spearman {found['spearman_length_per_token']:.3f}; AUROC {found['auroc']:.3f}, per token "
        f"{found['auroc_per_token']:.3f}; wrote {target}"
    )

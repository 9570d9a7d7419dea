"""The answers of a finished evaluation as `score` takes them: one model's answers for another model to score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_laser.data import ChatOptions
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.records import EvaluationRecord, record_fields
from megatron_laser.testtime.finished import FinishedBenchmark, read_finished
from megatron_laser.testtime.scoring import Answers, end_token

# What the rows get anew, and what they keep of it under another name.
_SCORES = ("score", "zc_logprob", "forced_score", "forced_zc_logprob")
_KEPT = {"score": "given_score", "zc_logprob": "given_zc_logprob"}


def read_evaluation_answers(
    model: ModelFolder,
    folder: Path,
    *,
    only: Sequence[str] = (),
    apply_chat_template: bool | None = None,
    prompt_suffix: str | None = None,
    options: ChatOptions | None = None,
    end_token_id: int | None = None,
) -> Answers:
    """Every response of an evaluation with its prompt, in `model`'s tokens.

    A row is the response's record with `benchmark`, and `given_score` and `given_zc_logprob` where the evaluation had a
    score. Responses with a box that did not end by themselves are scored behind a forced end
    (`evaluation.released_convention`) where the model can read that.

    Args:
        folder: the --output of `megatron-laser eval`.
        only: benchmarks; none: all.
        apply_chat_template, prompt_suffix, options: as in `model`'s training; None: as in the evaluation.
        end_token_id: see `end_token`.

    Raises:
        TestTimeError, DataError: as in `read_finished` and `FinishedBenchmark`; a response is too long for the model.
    """
    end = end_token(model, end_token_id)
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[list[int], list[int]]] = []
    forced: set[int] = set()
    for one in read_finished(folder, only=only):
        found = prompt_and_response_ids(
            one,
            model,
            apply_chat_template=apply_chat_template,
            prompt_suffix=prompt_suffix,
            options=options,
        )
        for record, (prompt, response) in zip(one.records, found, strict=True):
            fits = len(prompt) + len(response) + 1 < model.max_positions
            if record.scored and not fits:
                raise TestTimeError(
                    f"{one.folder}: row {record.row}, sample {record.sample}: {len(prompt) + len(response)} tokens and "
                    f"an end, but {model.path} reads {model.max_positions}"
                )
            if not record.scored and record.extracted is not None and fits:
                forced.add(len(rows))
            ends = record.scored or len(rows) in forced
            ended = response[-1:] and response[-1] in model.stop_token_ids
            pairs.append((prompt, [*response, *([] if ended else [end])] if ends else []))
            rows.append(_row(one.name, record))
    return Answers(rows, pairs, frozenset(forced))


def read_evaluation_sequences(
    model: ModelFolder,
    folder: Path,
    *,
    only: Sequence[str] = (),
    apply_chat_template: bool | None = None,
    prompt_suffix: str | None = None,
    options: ChatOptions | None = None,
) -> Answers:
    """The same rows with whole responses, cut off ones too, and the end only where the response wrote one.

    Raises as `read_evaluation_answers` does.
    """
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[list[int], list[int]]] = []
    for one in read_finished(folder, only=only):
        pairs += prompt_and_response_ids(
            one,
            model,
            apply_chat_template=apply_chat_template,
            prompt_suffix=prompt_suffix,
            options=options,
        )
        for record in one.records:
            row = _row(one.name, record)
            rows.append({name: value for name, value in row.items() if not name.startswith("forced")})
    for row, (prompt, response) in zip(rows, pairs, strict=True):
        if len(prompt) + len(response) > model.max_positions:
            raise TestTimeError(
                f"{folder}: {row['benchmark']} row {row['row']}, sample {row['sample']}: "
                f"{len(prompt) + len(response)} tokens, but {model.path} reads {model.max_positions}"
            )
    return Answers(rows, pairs)


def prompt_and_response_ids(
    finished: FinishedBenchmark,
    model: ModelFolder,
    *,
    apply_chat_template: bool | None,
    prompt_suffix: str | None,
    options: ChatOptions | None,
) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of every record, in `model`'s tokens, see `FinishedBenchmark`; the arguments are as above."""
    benchmark = finished.benchmark
    prompts = finished.prompts(
        model,
        apply_chat_template=benchmark.apply_chat_template
        if apply_chat_template is None
        else apply_chat_template,
        prompt_suffix=benchmark.prompt_suffix if prompt_suffix is None else prompt_suffix,
        options=ChatOptions(benchmark.chat_template_arguments, benchmark.system_prompt)
        if options is None
        else options,
    )
    responses = finished.response_ids(model)
    return [
        (prompts[record.row].token_ids, response)
        for record, response in zip(finished.records, responses, strict=True)
    ]


def _row(benchmark: str, record: EvaluationRecord) -> dict[str, Any]:
    row = {"benchmark": benchmark, **record_fields(record, prefixes=False)}
    kept = {new: row[old] for old, new in _KEPT.items() if row[old] is not None}
    return row | dict.fromkeys(_SCORES) | kept

"""Scores for given answers: a Python class, and JSON Lines in and out."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.data import NO_OPTIONS, ChatOptions, lone_surrogate
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.files import plain, replace_file, through_links
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.testtime.prompts import prompt_token_ids

THRESHOLD = 0.5  # a response is called right above it


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one response, all None where it has none: it did not end by itself.

    Attributes:
        score: r_s = beta * (zc_logprob - ref_logprob) on the scale of the model's targets: about 1 for right, 0 for
            wrong, not clamped.
        zc_logprob: log pi(score token | prompt, response, EOS).
        right: score > 0.5.
    """

    score: float | None
    zc_logprob: float | None
    right: bool | None


class Scorer:
    """Scores of (prompt, response) pairs under one engine; one token of work each where prefixes are cached."""

    def __init__(self, engine: RolloutEngine, model: ModelFolder, *, end_token_id: int | None = None) -> None:
        """
        Args:
            end_token_id: what stands behind a response that is given as text; by default the first of
                `model.stop_token_ids`, with which the model was calibrated.

        Raises:
            TestTimeError: the score token or its reference is not known, or the end token ends no response.
        """
        self._engine = engine
        self._model = model
        model.require_score()
        self._rule = model.rule
        self._end = end_token(model, end_token_id)

    def response_ids(self, response: str) -> list[int]:
        """See the function `response_ids`."""
        return response_ids(self._model, response, self._end)

    def score_ids(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, deadline: float
    ) -> list[Scored]:
        """Score (prompt ids, response ids); a response that does not end in a stop token has no score.

        Args:
            deadline: seconds for all of them.

        Raises:
            TestTimeError: an id outside the vocabulary, or longer than the model can read; names the pair.
            RuntimeError: the engine gave a log-prob that is not finite.
            TimeoutError: the deadline passed.
        """
        places, sequences = [], []
        for place, (prompt, response) in enumerate(pairs):
            sequence = [*prompt, *response]
            _check(self._model, place, prompt, sequence)
            if response and response[-1] in self._model.stop_token_ids:
                places.append(place)
                sequences.append(sequence)
        results = [Scored(None, None, None)] * len(pairs)
        values = self._rule.read(self._engine, sequences, deadline=deadline) if sequences else []
        for place, value in zip(places, values, strict=True):
            results[place] = self.scored(value)
        return results

    def score(self, pairs: Sequence[tuple[str, str]], *, deadline: float = 600.0) -> list[Scored]:
        """Score (prompt, response) texts. The prompt is taken as it stands, with the special tokens that the
        tokenizer adds; for chats build ids with `testtime.prompts.prompt_token_ids`."""
        encoded = []
        for place, (prompt, response) in enumerate(pairs):
            try:
                row = {"prompt": prompt}
                prompt_ids = prompt_token_ids(row, self._model.tokenizer, apply_chat_template=False)
                encoded.append((prompt_ids, self.response_ids(response)))
            except TestTimeError as error:
                raise TestTimeError(f"pair {place}: {error}") from None
        return self.score_ids(encoded, deadline=deadline)

    def scored(self, zc_logprob: float | None) -> Scored:
        """The score that follows from log pi(score token)."""
        if zc_logprob is None:
            return Scored(None, None, None)
        if not math.isfinite(zc_logprob):
            raise RuntimeError(
                f"the engine returned log-prob {zc_logprob} for the score token: check the weights"
            )
        score = self._rule.score(zc_logprob)
        assert score is not None  # `require_score`
        return Scored(score, zc_logprob, score > THRESHOLD)


def end_token(model: ModelFolder, end_token_id: int | None) -> int:
    """What stands behind a response given as text: the first of `model.stop_token_ids`, or the one that is named.

    Raises TestTimeError when that one ends no response.
    """
    end = model.stop_token_ids[0] if end_token_id is None else end_token_id
    if end not in model.stop_token_ids:
        raise TestTimeError(f"end token {end} ends no response; expected one of {list(model.stop_token_ids)}")
    return end


def response_ids(model: ModelFolder, response: str, end: int) -> list[int]:
    """A finished response as token ids, with the end token behind it (once).

    Sampled tokens need not be those that the tokenizer makes of their text: where the ids are known they are better.
    """
    if broken := lone_surrogate(response):
        raise TestTimeError(f"`response` holds {broken}")
    ids = [int(i) for i in model.tokenizer(response, add_special_tokens=False)["input_ids"]]
    return ids if ids and ids[-1] in model.stop_token_ids else [*ids, end]


def _check(model: ModelFolder, place: int, prompt: Sequence[int], sequence: Sequence[int]) -> None:
    """Refuse ids that the model cannot read; `place` is the pair's number, for the message."""
    if not prompt:
        raise TestTimeError(f"pair {place}: the prompt has no tokens")
    # an id outside the vocabulary would end an SGLang server
    if min(sequence) < 0 or max(sequence) >= model.vocab_size:
        raise TestTimeError(
            f"pair {place}: a token id is outside the vocabulary; expected 0 to {model.vocab_size - 1}"
        )
    if len(sequence) >= model.max_positions:
        raise TestTimeError(
            f"pair {place}: {len(sequence)} tokens, but the model reads {model.max_positions}"
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """Rows of a file as they are, and for each (prompt ids, response ids); no response ids: it was cut off.

    forced: places of those that were cut off and have an end put behind them; what is found there is `forced_score`.
    """

    rows: list[dict[str, Any]]
    pairs: list[tuple[list[int], list[int]]]
    forced: frozenset[int] = frozenset()


def read_answers(
    model: ModelFolder,
    source: Path,
    *,
    apply_chat_template: bool,
    prompt_suffix: str,
    end_token_id: int | None = None,
    options: ChatOptions = NO_OPTIONS,
) -> Answers:
    """Read a JSON Lines file and check all of it; needs no engine, so it comes before one is opened.

    A row has `prompt` (text), `messages` (a chat) or `prompt_ids`, or `problem` as records of evaluations do; and
    `response` (text) or `response_ids`. A
    `finish_reason` other than "stop" means: no score.

    Args:
        end_token_id: see `end_token`.
        options: what the chat template is given besides.

    Raises:
        TestTimeError: a row does not fit; names the line.
    """
    end = end_token(model, end_token_id)
    rows = list(json_rows(source))
    if not rows:
        raise TestTimeError(f"{source}: no rows; expected one JSON object on each line")
    pairs = [
        _pair(place, row, model, end, apply_chat_template, prompt_suffix, options) for place, row in rows
    ]
    return Answers([row for _, row in rows], pairs)


def score_file(
    scorer: Scorer,
    answers: Answers,
    target: Path,
    *,
    deadline: float,
    batch: int = 256,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Write the rows with `score`, `zc_logprob` and `right` added to each, as JSON Lines.

    Args:
        deadline: seconds for one batch.
        check: called before `target` is written; raises when the scores are not of one model.

    Returns:
        rows, scored, right (called so), score_mean, and of the score token's log-prob zc_mean and zc_std (the c_ref of
        this model, NaN without scores); where rows had one before (an evaluation of another model) zc_change and
        zc_change_std, of now minus then.

    Raises:
        RuntimeError, TimeoutError: as in `Scorer.score_ids`, and what `check` raises; `target` is then as it was.
    """
    rows, pairs = answers.rows, answers.pairs
    target = through_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    scores: list[float] = []
    zc_logprobs: list[float] = []
    changes: list[float] = []
    try:
        with partial.open("w", encoding="utf-8") as file:
            for start in range(0, len(rows), batch):
                results = scorer.score_ids(pairs[start : start + batch], deadline=deadline)
                for place, result in enumerate(results, start=start):
                    row, own = rows[place], result
                    if place in answers.forced:
                        row = row | {"forced_score": result.score, "forced_zc_logprob": result.zc_logprob}
                        own = Scored(None, None, None)
                    added = {
                        "score": plain(own.score),
                        "zc_logprob": plain(own.zc_logprob),
                        "right": own.right,
                    }
                    file.write(json.dumps(row | added, ensure_ascii=False) + "\n")
                    if own.score is None or own.zc_logprob is None:
                        continue
                    scores.append(own.score)
                    zc_logprobs.append(own.zc_logprob)
                    before = row.get("given_zc_logprob", row.get("zc_logprob"))
                    changes += [own.zc_logprob - before] if isinstance(before, float) else []
        check()
        replace_file(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "rows": len(rows),
        "scored": len(scores),
        "right": sum(score > THRESHOLD for score in scores),
        "score_mean": _mean(scores),
        "zc_mean": _mean(zc_logprobs),
        "zc_std": _std(zc_logprobs),
        **({"zc_change": _mean(changes), "zc_change_std": _std(changes)} if changes else {}),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def json_rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each line of a JSON Lines file. Raises TestTimeError: one is no JSON object."""
    if not source.is_file():
        raise TestTimeError(f"{source}: no such file")
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{source}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TestTimeError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TestTimeError(f"{place}: expected a JSON object, found a {type(row).__name__}")
            if broken := lone_surrogate(row):  # anywhere: the row is written again with its score
                raise TestTimeError(f"{place}: {broken}")
            yield place, row


def _pair(
    place: str,
    row: dict[str, Any],
    model: ModelFolder,
    end: int,
    apply_chat_template: bool,
    prompt_suffix: str,
    options: ChatOptions,
) -> tuple[list[int], list[int]]:
    names = ("prompt", "messages", "prompt_ids")
    asked = row if any(row.get(name) is not None for name in names) else {"prompt": row.get("problem")}
    try:
        prompt = prompt_token_ids(
            asked,
            model.tokenizer,
            apply_chat_template=apply_chat_template,
            prompt_suffix=prompt_suffix,
            options=options,
        )
        if "response_ids" in row:
            response = _ids(row["response_ids"], "response_ids")
        elif isinstance(row.get("response"), str):
            response = response_ids(model, row["response"], end)
        else:
            raise TestTimeError("expected `response` (text) or `response_ids`")
        _check(model, 0, prompt, [*prompt, *response])
    except TestTimeError as error:
        raise TestTimeError(f"{place}: {error}") from None
    if row.get("finish_reason", "stop") != "stop":
        response = []  # cut off: the model never ended it
    return prompt, response


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise TestTimeError(f"`{name}`: expected a list of token ids")
    return value

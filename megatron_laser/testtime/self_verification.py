"""`megatron-laser verify`: a model is asked, in a second prompt, whether given responses are right.

Every verdict is on disk as it arrives, beside the file that is written; the same command goes on after a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laser.algorithms.metrics import verification_metrics
from megatron_laser.data import NO_OPTIONS, ChatOptions
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.engine_choice import EngineChoice
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.pinned_weights import PinnedWeights
from megatron_laser.evaluation.progress import Progress
from megatron_laser.evaluation.records import record_fields
from megatron_laser.evaluation.responses import ResponseFile, Sampler, SavedResponse
from megatron_laser.evaluation.weight_identity import WeightsChanged
from megatron_laser.files import plain, through_links, write_atomically
from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.testtime.finished import read_finished
from megatron_laser.testtime.prompts import prompt_token_ids
from megatron_laser.testtime.scoring import THRESHOLD, json_rows
from megatron_laser.testtime.verdicts import VerdictForm, share_right
from megatron_laser.types import Prompt, SamplingParams

logger = logging.getLogger(__name__)

_DROPPED = ("forced_score", "forced_zc_logprob", "zc_logprob", "mean_logprob")


@dataclass(frozen=True, slots=True)
class VerdictSettings:
    """How verdicts are sampled; see the options of `megatron-laser verify`."""

    form: VerdictForm
    verdicts: int = 1
    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1234
    apply_chat_template: bool = True
    options: ChatOptions = NO_OPTIONS


def read_questions(source: Path, *, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows with `problem` (or `prompt`) and `response`: of a JSON Lines file, or the records of an evaluation.

    An evaluation's rows have `benchmark`, and its own score as `given_score`.

    Raises:
        TestTimeError, DataError: a row has not both as texts, or there is none; no finished evaluation.
    """
    if source.is_dir():
        rows = []
        for one in read_finished(source, only=only):
            for record in one.records:
                fields = record_fields(record, prefixes=False)
                row = {"benchmark": one.name, **fields, "given_score": record.score}
                rows.append({name: value for name, value in row.items() if name not in _DROPPED})
        return rows
    rows = []
    for place, row in json_rows(source):
        if not isinstance(_problem(row), str) or not isinstance(row.get("response"), str):
            raise TestTimeError(f"{place}: expected `problem` (or `prompt`) and `response`, both texts")
        rows.append({name: value for name, value in row.items() if name not in _DROPPED})
    if not rows:
        raise TestTimeError(f"{source}: no rows; expected one JSON object on each line")
    return rows


def verify_file(
    model: ModelFolder,
    rows: Sequence[dict[str, Any]],
    target: Path,
    choice: EngineChoice,
    settings: VerdictSettings,
    *,
    deadline: float,
    engine: RolloutEngine | None = None,
) -> dict[str, float]:
    """Ask for verdicts on all rows and write the rows with `verdicts`, `score` (the share of right ones) and texts.

    Args:
        deadline: seconds for all of it.
        engine: to use in place of one made of `choice`; it stays open.

    Returns:
        See `verdict_summary`.

    Raises:
        TestTimeError: a prompt is too long for the model.
        WeightsChanged: the weights were changed meanwhile.
        TimeoutError: the deadline passed; what arrived is kept.
    """
    prompts = _prompts(model, rows, settings)
    target = through_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sampling = SamplingParams(
        samples_per_prompt=settings.verdicts,
        max_new_tokens=settings.max_new_tokens,
        stop_token_ids=model.stop_token_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    with PinnedWeights(choice, model, deadline=deadline, engine=engine) as weights:
        kept = _kept_path(target, weights.identity, prompts, sampling, choice)
        try:
            verdicts = _sample(weights, prompts, sampling, choice, kept, target.name, deadline)
        except Exception:
            with contextlib.suppress(ServerError):  # one that is gone; the next attempt asks again
                _check(weights, kept)  # what is kept for that attempt must be of one model
            raise
        _check(weights, kept)
    written = []
    for row, found in zip(rows, verdicts, strict=True):
        texts = [model.decode(one.text_ids) for one in found]
        told = [settings.form.read(text) for text in texts]
        score = share_right(told)
        right = None if score is None else score > THRESHOLD
        written.append(row | {"verdicts": told, "score": score, "right": right, "verdict_texts": texts})
    lines = [
        json.dumps({name: plain(value) for name, value in row.items()}, ensure_ascii=False) for row in written
    ]
    write_atomically(target, "\n".join(lines) + "\n")
    kept.unlink()
    return verdict_summary(written)


def verdict_summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Counts, and where rows have a `reward` how often the verdict agrees.

    Returns:
        responses, verdicts, unparsable (verdicts that say neither), without_verdict (responses all of whose verdicts
        do), and over labelled responses accuracy_correct, accuracy_incorrect and f1 of those with a verdict, and
        strict_f1 of all, where one without a verdict is called wrong.
    """
    verdicts = [verdict for row in rows for verdict in row["verdicts"]]
    labelled = [row for row in rows if isinstance(row.get("reward"), int | float)]
    judged = [row for row in labelled if row["score"] is not None]
    of_judged, of_all = (
        verification_metrics(
            [row["score"] or 0.0 for row in chosen], [float(row["reward"] > 0.5) for row in chosen]
        )
        for chosen in (judged, labelled)
    )
    return {
        "responses": len(rows),
        "verdicts": len(verdicts),
        "unparsable": sum(verdict is None for verdict in verdicts),
        "without_verdict": sum(row["score"] is None for row in rows),
        "labelled": len(labelled),
        "accuracy_correct": of_judged.accuracy_correct,
        "accuracy_incorrect": of_judged.accuracy_incorrect,
        "f1": of_judged.f1,
        "strict_f1": of_all.f1,
    }


def _check(weights: PinnedWeights, kept: Path) -> None:
    try:
        weights.check()
    except WeightsChanged as error:
        mixed = kept.with_suffix(".mixed")
        kept.replace(mixed)
        raise WeightsChanged(
            f"{error}. Verdicts of two models may be in {mixed}, which counts for nothing; the same command starts anew"
        ) from None


def _problem(row: dict[str, Any]) -> Any:
    return row["problem"] if row.get("problem") is not None else row.get("prompt")


def _prompts(model: ModelFolder, rows: Sequence[dict[str, Any]], settings: VerdictSettings) -> list[Prompt]:
    prompts = []
    for number, row in enumerate(rows):
        text = settings.form.prompt(_problem(row), row["response"])
        ids = prompt_token_ids(
            {"prompt": text},
            model.tokenizer,
            apply_chat_template=settings.apply_chat_template,
            options=settings.options,
        )
        prompts.append(Prompt(row=number, problem=text, answer="", token_ids=ids))
    room = model.max_positions - settings.max_new_tokens - 1
    if long := [len(prompt.token_ids) for prompt in prompts if len(prompt.token_ids) > room]:
        raise TestTimeError(
            f"{len(long)} of {len(prompts)} prompts (the longest has {max(long)} tokens) and --max-new-tokens "
            f"{settings.max_new_tokens} are more than the {model.max_positions} tokens that {model.path} reads; "
            f"expected --max-new-tokens {max(1, model.max_positions - max(long) - 1)} or less, or shorter answers"
        )
    return prompts


def _kept_path(
    target: Path,
    weights: str | None,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    choice: EngineChoice,
) -> Path:
    """Where verdicts are kept until all are there; another name for everything that they depend on."""
    identity = {
        "weights": weights or uuid.uuid4().hex,  # servers that do not tell: never gone on with
        "prompts": [prompt.token_ids for prompt in prompts],
        "engine": choice.name,
        "batch": choice.generation_batch if choice.repeatable else None,
        **asdict(sampling),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return target.with_name(f".{target.name}.{digest}.verdicts")


def _sample(
    weights: PinnedWeights,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    choice: EngineChoice,
    kept: Path,
    name: str,
    deadline: float,
) -> list[list[SavedResponse]]:
    ends = time.monotonic() + deadline
    progress = Progress(f"verdicts for {name}", len(prompts) * sampling.samples_per_prompt)
    per_call = max(1, choice.generation_batch // sampling.samples_per_prompt)
    found: list[list[SavedResponse]] = []
    with ResponseFile(kept) as responses, progress:
        for length in responses.lengths():
            progress.response(length, False)
        sampler = Sampler(
            *(weights.engine(), sampling, None, responses, choice.repeatable, progress.response, ends)
        )
        for start in range(0, len(prompts), per_call):
            batch = prompts[start : start + per_call]
            found += sampler.run(batch, batch, start)
    return found

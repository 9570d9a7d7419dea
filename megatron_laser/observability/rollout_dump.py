"""One step's rollouts as a file for people: what was asked, answered, graded and scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laser.files import plain, write_atomically
from megatron_laser.observability.token_dump import Decode, Readings, TokenValues, by_response, token_fields
from megatron_laser.types import OF_TERMS, RolloutBatch


@dataclass(frozen=True)
class TokenPart:
    """What a dump has of each token (`logging.rollouts_tokens`).

    values: the trainer's; None: it made no pass over all tokens before the update. readings: [samples], what each
    readout read of a response. decode: ids to text without special tokens.
    """

    values: TokenValues | None
    readings: Sequence[Readings]
    decode: Decode


def dump_rollouts(
    path: Path,
    batch: RolloutBatch,
    scores: Sequence[float] | Any,
    advantages: Sequence[float] | Any,
    tokens: TokenPart | None = None,
) -> None:
    """Write one JSON line for each response, group after group, those without a grade last; atomically.

    A response whose grading failed has no reward, score or advantage (null). `policy_reward`, `terms` and `vote_answer`
    are there where the reward has terms or a threshold, or its function gave an answer.

    Args:
        scores: [samples] r_s as a sequence, array or tensor; NaN or None without one (written as null).
        advantages: [samples], as the policy loss used them.
        tokens: further fields for each token, see `token_dump`.

    Raises:
        ValueError: the number of scores or advantages is not that of the samples.
    """
    score_values, advantage_values = plain(scores), plain(advantages)
    count = sum(1 for _ in batch.samples())
    for name, values in (("scores", score_values), ("advantages", advantage_values)):
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} samples of step {batch.step}")
    lines: list[str] = []
    place = iter(zip(score_values, advantage_values, strict=True))
    lengths = [len(sample.generation.response_ids) for sample in batch.samples()]
    of_tokens = iter(
        [] if tokens is None else zip(by_response(tokens.values, lengths), tokens.readings, strict=True)
    )
    for group in batch.groups:
        for number, sample in enumerate((*group.samples, *group.ungraded)):
            graded = number < len(group.samples)
            score, advantage = next(place) if graded else (None, None)
            generation = sample.generation
            logprobs = generation.policy_logprobs
            record = {
                "step": batch.step,
                "row": group.prompt.row,
                "source": group.prompt.source,
                "sample": number,
                "epoch": group.prompt.epoch,
                "problem": group.prompt.problem,
                "answer": group.prompt.answer,
                "response": sample.text,
                "reward": sample.reward if graded else None,
                "outcome": sample.outcome,
                "scored": sample.scored,
                "zc_logprob": sample.zc_logprob,
                "score": score,
                "advantage": advantage,
                "finish_reason": generation.finish_reason,
                "response_ids_length": len(generation.response_ids),
                "mean_logprob": float(logprobs.mean(dtype=np.float64)) if len(logprobs) else None,
                "weight_version": generation.weight_version,
            }
            own = {name: value for name in OF_TERMS if (value := getattr(sample, name)) is not None}
            fields = {name: plain(value) for name, value in record.items()} | own
            if tokens is not None:
                values, readings = next(of_tokens) if graded else (None, {})
                fields |= token_fields(sample, values, readings, tokens.decode)
            lines.append(json.dumps(fields, ensure_ascii=False))
    write_atomically(path, "".join(line + "\n" for line in lines))

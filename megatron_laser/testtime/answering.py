"""One question to one answer: sample k, score each, vote."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.rewards import GradingPool, answer_form
from megatron_laser.rollout.engine import RolloutEngine, takes_seeds
from megatron_laser.testtime.chat_request import ChatRequest, RequestError
from megatron_laser.testtime.scoring import Scorer
from megatron_laser.testtime.voting import Choice, choose
from megatron_laser.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One of the k. `response_ids` has the end token. `finished`: it ended by itself; only then it has a score."""

    text: str
    response_ids: list[int]
    finished: bool
    score: float | None
    answer: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """All samples, and the one that the vote chose. `tokens`: of all responses together."""

    samples: list[SampledAnswer]
    choice: Choice
    tokens: int


def answer(
    engine: RolloutEngine,
    scorer: Scorer,
    model: ModelFolder,
    chat: ChatRequest,
    pool: GradingPool,
    deadline: float,
) -> Answer:
    """Sample `chat.k` responses, score them and vote.

    The engine is asked for the scores together with the responses, and once more for those that it did not give.

    Args:
        deadline: seconds for everything.

    Raises:
        TimeoutError: the deadline passed.
        RequestError: a seed for servers that ignore seeds.
    """
    if chat.seed is not None and not takes_seeds(engine):
        raise RequestError(
            400,
            "the servers behind this model ignore seeds (they were started without --enable-deterministic-inference), "
            "so the same request would not get the same answer; leave `seed` out",
            "seed",
            "unsupported_parameter",
        )
    ends = time.monotonic() + deadline
    sampling = SamplingParams(
        samples_per_prompt=chat.k,
        max_new_tokens=chat.max_new_tokens,
        stop_token_ids=model.stop_token_ids,
        temperature=chat.temperature,
        top_p=chat.top_p,
        seed=chat.seed,
        score_token_id=model.score_token_id if model.rule.is_plain else None,
    )
    (generations,) = engine.generate([chat.prompt_ids], sampling, deadline=deadline)
    scored = [generation.is_scored(model.stop_token_ids) for generation in generations]
    scores = [
        scorer.scored(generation.zc_logprob).score if finished else None
        for generation, finished in zip(generations, scored)
    ]
    missing = [place for place, finished in enumerate(scored) if finished and scores[place] is None]
    if missing:
        pairs = [(chat.prompt_ids, generations[place].response_ids.tolist()) for place in missing]
        for place, result in zip(missing, scorer.score_ids(pairs, deadline=_left(ends)), strict=True):
            scores[place] = result.score
    texts = [model.decode(generation.text_ids) for generation in generations]
    form = answer_form(model.from_run.get("reward", "math_verify"))
    choice = choose(texts, scores, vote=chat.vote, pool=pool, deadline=_left(ends), form=form)
    samples = [
        SampledAnswer(text, generation.response_ids.tolist(), finished, score, form.extract(text, ""))
        for text, generation, finished, score in zip(texts, generations, scored, scores, strict=True)
    ]
    return Answer(samples, choice, sum(len(generation.response_ids) for generation in generations))


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time was left to score and vote")
    return left

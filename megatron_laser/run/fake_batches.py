"""Made-up batches for trials of a layout (`run.fake.responses`): lengths as a policy might have them, and noise."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from megatron_laser.config import Architecture, RunConfig, read_architecture
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample, TokenSets

_SHORTEST = 2  # tokens of a response: one, and what ends it


class FakeBatches:
    """A `BatchSource` of noise: the same batch for a step whenever it is asked, by `run.seed`."""

    def __init__(
        self, config: RunConfig, stop_token_ids: tuple[int, ...], score_token_id: int | None
    ) -> None:
        self._config = config
        self._architecture = read_architecture(config.model.path)
        self._stops = stop_token_ids
        kept_out = {*stop_token_ids, score_token_id}
        self._tokens = np.array(
            [i for i in range(self._architecture.vocab_size) if i not in kept_out], np.int32
        )

    def batch(self, step: int) -> RolloutBatch:
        """See `BatchSource`. Half of the responses are right; log-probs are those of a uniform policy."""
        config, rollout = self._config, self._config.rollout
        random = np.random.default_rng((config.run.seed, step))
        longest = config.data.max_prompt_tokens
        mean = config.run.fake.prompt_tokens or max(1, longest // 2)
        prompts = _lengths(random, rollout.prompts_per_step, mean, 0.3, 1, longest)
        groups = []
        for row, length in enumerate(prompts.tolist()):
            ids = random.choice(self._tokens, length).tolist()
            prompt = Prompt(row, "made up", "made up", ids)
            groups.append(
                Group(prompt, [self._sample(random, prompt) for _ in range(rollout.samples_per_prompt)])
            )
        return RolloutBatch(step, step - 1, groups)

    def progress(self, step: int) -> dict[str, float]:
        """See `BatchSource`: there is no data to go through."""
        return {}

    def _sample(self, random: np.random.Generator, prompt: Prompt) -> Sample:
        config, rollout, fake = self._config, self._config.rollout, self._config.run.fake
        longest = rollout.max_new_tokens
        mean = fake.response_tokens or max(1, longest // 4)
        # One more than the longest stands for all that would be longer: these are cut off.
        length = int(_lengths(random, 1, mean, fake.spread, _SHORTEST, longest + 1)[0])
        stopped = length <= longest
        length = min(length, longest)
        ids = random.choice(self._tokens, length)
        if stopped:
            ids[-1] = self._stops[0]
        uniform = -math.log(self._architecture.vocab_size)
        scored = stopped and config.laser.enabled
        zc = uniform if scored and config.laser.score_source == "server" else None
        right = bool(random.integers(2))
        generation = Generation(
            ids,
            np.full(length, uniform if rollout.top_k is None else -math.log(rollout.top_k), np.float32),
            "stop" if stopped else "length",
            weight_version=0,
            zc_logprob=zc,
            routed_experts=self._routes(random, len(prompt.token_ids) + length)
            if config.moe.routing_replay
            else None,
            sets=None if rollout.top_k is None else _sets(ids, rollout.top_k, self._architecture.vocab_size),
        )
        outcome = "correct" if right else "wrong"
        return Sample(prompt.token_ids, generation, "made up", stopped, float(right), outcome, zc)

    def _routes(self, random: np.random.Generator, tokens: int) -> npt.NDArray[np.uint8 | np.int16] | None:
        return _routes(random, tokens, self._architecture)


def _lengths(
    random: np.random.Generator, count: int, mean: int, spread: float, least: int, most: int
) -> npt.NDArray[np.int64]:
    """[count] log-normal with that mean, rounded and clipped."""
    drawn = random.lognormal(math.log(mean) - spread**2 / 2, spread, count)
    return np.clip(np.rint(drawn), least, most).astype(np.int64)


def _sets(ids: npt.NDArray[np.int32], size: int, vocab: int) -> TokenSets:
    """Of each token `size` ids of which it is the first."""
    members = (ids[:, None].astype(np.int64) + np.arange(size)) % vocab
    return TokenSets(np.full(len(ids), size, np.int32), members.astype(np.int32).reshape(-1))


def _routes(
    random: np.random.Generator, tokens: int, architecture: Architecture
) -> npt.NDArray[np.uint8 | np.int16] | None:
    """[tokens, layers, experts of a token], neighbours of a random one."""
    moe = architecture.moe
    if moe is None:
        return None
    first = random.integers(moe.num_experts, size=(tokens, architecture.num_layers, 1))
    chosen = (first + np.arange(moe.experts_per_token)) % moe.num_experts
    return chosen.astype(np.uint8 if moe.num_experts <= 256 else np.int16)

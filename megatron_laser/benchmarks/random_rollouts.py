"""Rollouts of random tokens, for benchmarks of the trainer."""

from __future__ import annotations

import numpy as np

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample


def random_rollouts(
    *, prompts: int, samples: int, prompt: int, response: int, ids: tuple[int, int], eos: int, common: int = 0
) -> FlatBatch:
    """`prompts` groups of `samples` responses, all scored, every second one right.

    Args:
        prompt, response: tokens of each; the response's last one is `eos`.
        ids: the first ordinary token id, and the vocabulary's size.
        common: tokens that all prompts begin with.
    """
    rng = np.random.default_rng(0)
    batch = RolloutBatch(step=1, weight_version=0)
    beginning = rng.integers(*ids, common).tolist()
    for row in range(prompts):
        tokens = [*beginning, *rng.integers(*ids, prompt - common).tolist()]
        group = Group(Prompt(row, "", "", tokens), [])
        for sample in range(samples):
            answer = np.append(rng.integers(*ids, response - 1), eos).astype(np.int32)
            generation = Generation(answer, np.full(response, -9.0, np.float32), "stop", 0)
            group.samples.append(Sample(tokens, generation, "", True, float(sample % 2), "correct", -20.0))
        batch.groups.append(group)
    return flatten(batch)

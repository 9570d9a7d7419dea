"""Rollouts whose tokens were sampled from sets, and the plain trainer that renormalises over them."""

from dataclasses import replace

import numpy as np
import torch

from helpers.plain_training import Plain, PlainTrainer
from helpers.rollouts import STEPS, rollout_batch
from megatron_laser.batching.flat import FlatBatch


class PlainOverSets(PlainTrainer):
    """Log-probs of tokens with a set are renormalised over it, in float64; entropies and scores are not."""

    def logprobs(self, model, flat, i):
        policy, _ = self.rows(model, flat, i)
        logprobs, entropies, zc = super().logprobs(model, flat, i)
        renormalised = []
        for row, logprob, token in zip(policy, logprobs, range(*flat.response_offsets[i : i + 2])):
            members = flat.set_ids[slice(*flat.set_offsets[token : token + 2])].tolist()
            renormalised.append(logprob - row[members].logsumexp(0) if members else logprob)
        return torch.stack(renormalised), entropies, zc


def batch_with_sets(step: int, model: torch.nn.Module, temperature: float) -> tuple[FlatBatch, np.ndarray]:
    """Rollouts whose log-probs are the model's with noise, so that some ratios are clipped; and the noise.

    Every tenth token has no set, the others' are their own and up to twelve more.
    """
    flat, rng = rollout_batch(STEPS[step - 1], seed=step), np.random.default_rng(step)
    labels = np.concatenate([flat.response_ids(i) for i in range(flat.num_samples)])
    members = [
        [] if t % 10 == 0 else list({int(label), *rng.integers(0, 250, t % 13).tolist()})
        for t, label in enumerate(labels)
    ]
    flat = replace(
        flat,
        set_counts=np.array([len(one) for one in members], np.int32),
        set_ids=np.array([i for one in members for i in one], np.int32),
    )
    with torch.no_grad():
        plain = PlainOverSets(model, Plain(0, 0, 0, temperature, "rollout"))
        logprobs = np.concatenate([plain.logprobs(model, flat, i)[0] for i in range(flat.num_samples)])
    noise = rng.normal(0.0, 0.3, len(logprobs))
    return replace(flat, rollout_logprobs=(logprobs + noise).astype(np.float32)), noise

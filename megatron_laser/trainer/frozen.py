"""The trainer of a run that only generates (`run.mode: rollout_only`): its weights go to the engine and stay."""

from __future__ import annotations

import math

import torch

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.trainer.step_data import check_token_ids
from megatron_laser.trainer.trainer import StepResult, Trainer


class FrozenTrainer(Trainer):
    """A trainer whose steps compute nothing and change nothing."""

    def train_step(self, flat: FlatBatch, step: int) -> StepResult:
        """The step's log-probs of the score token where the engine read them; no scores, no advantages, no update.

        Raises:
            ValueError: a token id is not in the vocabulary.
        """
        check_token_ids(flat, self.policy.chunks.geometry.vocab)
        unknown = torch.full((flat.num_samples,), math.nan)
        return StepResult({}, torch.from_numpy(flat.zc_logprobs.copy()), unknown, unknown, ())

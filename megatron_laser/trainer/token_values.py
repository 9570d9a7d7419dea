"""The old policy's log-prob and entropy of each response token, from the ranks that have its row to rank 0.

On steps whose rollouts are dumped with tokens (`logging.rollouts_tokens`) the old-policy pass gives entropies too, sums
beside those that log-probs are made of, which change none of them, and one reduction brings both to rank 0. A token's
row is on one context rank of the last pipeline stage of one data rank; all others add zeros.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config.derived import old_policy_pass_kind
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.model.policy_model import HeadInputs
from megatron_laser.observability.token_dump import TokenValues as TokenValues
from megatron_laser.trainer.micro_batch import MicroBatch


class OwnTokens:
    """What this rank reads of a batch's response tokens; nothing where nobody wants it.

    Wanted on steps whose rollouts are dumped with tokens, if a pass before the update reads all of them (not with
    `policy.old_logprobs: rollout`): the same on every rank.
    """

    def __init__(self, config: RunConfig, flat: FlatBatch, step: int) -> None:
        every = config.logging.rollouts_every if config.logging.rollouts_tokens else 0
        self._wanted = every > 0 and step % every == 0 and old_policy_pass_kind(config) == "full"
        self._sampled = flat.sampled
        self._values = torch.zeros(2, len(flat.rollout_logprobs) if self._wanted else 0)

    def head(self, batch: MicroBatch) -> HeadInputs:
        """What the old-policy pass computes of a micro-batch."""
        return batch.with_entropy() if self._wanted else batch.without_entropy()

    def add(self, batch: MicroBatch, output: torch.Tensor) -> None:
        """Of a micro-batch, on the last pipeline stage: the head's output, [2, rows] where it is wanted."""
        if not self._wanted:
            return
        rows = output.index_select(1, batch.policy_rows)
        self._values[:, torch.from_numpy(batch.policy_places)] = rows.float().cpu()

    def on_rank_zero(self, runtime: Runtime) -> TokenValues | None:
        """All ranks' together, on rank 0; None on the others, or not wanted. Call on every rank."""
        if not self._wanted:
            return None
        if runtime.world_size > 1:
            if not runtime.reports_rows:
                self._values.zero_()
            dist.reduce(self._values, dst=0, group=runtime.cpu_group)
        if not runtime.is_main:
            return None
        found = self._values.numpy()
        if len(self._sampled):
            found[:, ~self._sampled] = np.nan
        return TokenValues(found[0], found[1])

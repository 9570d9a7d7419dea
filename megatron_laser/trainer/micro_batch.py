"""A packed micro-batch on the device: the model's inputs, and what the loss knows about its labelled rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_laser.model.policy_model import HeadInputs


@dataclass(kw_only=True)
class LabelledRows:
    """What the loss knows about consecutive labelled rows; tensors are on the device.

    policy_rows, score_rows: the positions among them, increasing, of the response tokens' rows and of the rows that
    readouts read, such as the EOS rows labelled z_c; every row is one or the other. policy_sample and score_sample
    int64: sample indexes in the rollout batch; score_slot int64: `Marks.slot`. The log-prob tensors are per policy row
    and are filled in as they become known; log_importance, of the row's response, only for `policy.importance_level`.
    On the host: policy_counts [rows + 1], how many of the first 0, 1, .. rows are policy rows; score_readout [score
    rows], which readout reads them.
    """

    policy_rows: torch.Tensor
    score_rows: torch.Tensor
    policy_sample: torch.Tensor
    score_sample: torch.Tensor
    score_slot: torch.Tensor
    rollout_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    log_importance: torch.Tensor | None = None
    policy_counts: np.ndarray
    score_readout: np.ndarray

    def block(self, rows: slice) -> LabelledRows:
        """Rows [rows.start, rows.stop) alone: views, but for the shifted positions, and no wait for the device."""
        first, last = int(self.policy_counts[rows.start]), int(self.policy_counts[rows.stop])
        policy, score = slice(first, last), slice(rows.start - first, rows.stop - last)
        return LabelledRows(
            policy_rows=self.policy_rows[policy] - rows.start,
            score_rows=self.score_rows[score] - rows.start,
            policy_sample=self.policy_sample[policy],
            score_sample=self.score_sample[score],
            score_slot=self.score_slot[score],
            rollout_logprobs=self.rollout_logprobs[policy],
            old_logprobs=_part(self.old_logprobs, policy),
            reference_logprobs=_part(self.reference_logprobs, policy),
            log_importance=_part(self.log_importance, policy),
            policy_counts=self.policy_counts[rows.start : rows.stop + 1] - first,
            score_readout=self.score_readout[score],
        )

    def read_by(self, readout: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions among the labelled rows, slots) of what one readout reads, in order."""
        own = np.flatnonzero(self.score_readout == readout)
        if len(own) == len(self.score_readout):
            return self.score_rows, self.score_slot
        chosen = torch.from_numpy(own).to(self.score_rows.device)
        return self.score_rows[chosen], self.score_slot[chosen]


def _part(values: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if values is None else values[rows]


@dataclass(kw_only=True)
class MicroBatch(LabelledRows):
    """Model inputs [1, tokens] on the device, and the labelled rows: of the micro-batch, or a context rank's share.

    `packed` describes whole sequences, of which a context rank has chunks. policy_places, on the host: [policy rows]
    int64, of each the place of its token in `FlatBatch.rollout_logprobs`.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    packed: PackedSeqParams
    head: HeadInputs
    policy_places: np.ndarray

    def without_entropy(self) -> HeadInputs:
        """Head inputs for all labelled rows, log-probs only."""
        return replace(self.head, with_entropy=False)

    def with_entropy(self) -> HeadInputs:
        """Head inputs for all labelled rows, log-probs and entropies without their gradients."""
        return replace(self.head, with_entropy=True, entropy_gradient=False)

    def only_scores(self) -> HeadInputs:
        """Head inputs for the score rows alone, through the few-row op."""
        return HeadInputs(
            rows=self.head.rows[self.score_rows],
            labels=self.head.labels[self.score_rows],
            inv_temperature=self.head.inv_temperature[self.score_rows],
            few_rows=True,
        )

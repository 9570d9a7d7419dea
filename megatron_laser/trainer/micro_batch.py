"""One packed micro-batch on the device: what the model reads, and what the loss needs for its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.batching.packing import PackedMicroBatch, pack
from megatron_laser.model import platform
from megatron_laser.model.policy_model import HeadInputs


@dataclass
class MicroBatch:
    """Model inputs [1, tokens] and per labelled row [rows] tensors, all on the device.

    is_score marks the EOS rows labelled z_c; `policy_rows` and `score_rows` are the positions of both kinds.
    policy_sample and score_sample int64 are sample indexes in the rollout batch. The log-prob tensors are per
    policy row and are filled in as they become known.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    packed: PackedSeqParams
    head: HeadInputs
    policy_rows: torch.Tensor
    score_rows: torch.Tensor
    policy_sample: torch.Tensor
    score_sample: torch.Tensor
    rollout_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None

    def without_entropy(self) -> HeadInputs:
        """Head inputs for all labelled rows, log-probs only."""
        return replace(self.head, with_entropy=False)

    def only_scores(self) -> HeadInputs:
        """Head inputs for the score rows alone, through the few-row op."""
        return HeadInputs(
            rows=self.head.rows[self.score_rows],
            labels=self.head.labels[self.score_rows],
            inv_temperature=self.head.inv_temperature[self.score_rows],
            few_rows=True,
        )


def make_micro_batch(
    flat: FlatBatch,
    samples: Sequence[int],
    *,
    score_token_id: int | None,
    temperature: float,
    pad_multiple: int,
    entropy_gradient: bool = False,
) -> MicroBatch:
    """Pack the given samples of the rollout batch and place them on the device.

    `entropy_gradient`: the loss has an entropy term; else entropies are a metric only.
    """
    packed = pack(
        [flat.pack_input(index) for index in samples],
        score_token_id=score_token_id,
        pad_multiple=pad_multiple,
        inv_temperature=1.0 / temperature,
    )
    device = platform.device()

    def put(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    cu_seqlens = put(packed.cu_seqlens, torch.int32)
    policy = ~packed.is_score
    return MicroBatch(
        tokens=put(packed.tokens, torch.int64).unsqueeze(0),
        position_ids=put(packed.position_ids, torch.int64).unsqueeze(0),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=packed.max_seqlen,
            max_seqlen_kv=packed.max_seqlen,
        ),
        head=HeadInputs(
            rows=put(packed.row_index, torch.int64),
            labels=put(packed.labels, torch.int64),
            inv_temperature=put(packed.inv_temperature, torch.float32),
            with_entropy=True,
            entropy_gradient=entropy_gradient,
        ),
        policy_rows=put(np.flatnonzero(policy), torch.int64),
        score_rows=put(np.flatnonzero(packed.is_score), torch.int64),
        policy_sample=put(packed.sample_index[policy], torch.int64),
        score_sample=put(packed.sample_index[packed.is_score], torch.int64),
        rollout_logprobs=put(_rollout_logprobs(flat, packed, policy), torch.float32),
    )


def _rollout_logprobs(flat: FlatBatch, packed: PackedMicroBatch, policy: np.ndarray) -> np.ndarray:
    starts = flat.response_offsets[packed.sample_index[policy]]
    return flat.rollout_logprobs[starts + packed.response_position[policy]]

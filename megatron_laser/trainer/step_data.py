"""One rollout batch as this rank trains on it: schedule, packed micro-batches, counts of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_laser.algorithms.policy_loss import sequence_token_weights
from megatron_laser.batching.context import context_shard
from megatron_laser.batching.flat import FlatBatch
from megatron_laser.batching.packing import PackedMicroBatch, pack
from megatron_laser.batching.readout_points import ReadoutPoints
from megatron_laser.batching.schedule import build_schedule
from megatron_laser.batching.shared_prompts import shared_units, unit_tokens
from megatron_laser.config import Architecture
from megatron_laser.config.derived import (
    gpu_pad_multiple,
    micro_batch_tokens,
    needed_pad_multiple,
    padded_tokens,
)
from megatron_laser.config.model_folder.flops import forward_flops
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.model import platform
from megatron_laser.model.experts import LoadBalance, Routing, Tally
from megatron_laser.model.policy_model import HeadInputs
from megatron_laser.model.torch_layers import share_prompts as share_packed_prompts
from megatron_laser.trainer.expert_routing import Experts
from megatron_laser.trainer.micro_batch import MicroBatch
from megatron_laser.trainer.row_sets import row_sets
from megatron_laser.trainer.run_readouts import RunReadouts


@dataclass
class MiniBatch:
    """The samples of one optimizer step.

    Counts are over all data-parallel and context ranks: the loss is a sum divided by them, however the batch is cut.
    point_counts, class_weights: of each readout, its points and the weights of right and wrong ones.
    token_weights [samples of the rollout batch] float32: the weight of each policy row of a sample.
    balance, tally: the losses of the routers, and what they counted in a pass; None for a dense model.
    """

    micro_batches: list[MicroBatch]
    num_samples: int
    num_tokens: int
    point_counts: tuple[int, ...]
    class_weights: tuple[tuple[float, float], ...]
    token_weights: torch.Tensor
    balance: LoadBalance | None = None
    tally: Tally | None = None

    @property
    def routings(self) -> list[Routing]:
        """What the routers get with each micro-batch; empty for a dense model."""
        return [
            batch.packed.routing
            for batch in self.micro_batches
            if getattr(batch.packed, "routing", None) is not None
        ]


@dataclass
class StepData:
    """All optimizer steps of one rollout batch, and per-sample facts known to every rank.

    rewards, policy_rewards, scored, group_ids: [samples], on the CPU; labels, and what the policy learns from, which
    are the same where there is one reward. points: what readouts read of the batch. rank_imbalance: how much
    longer the busiest data-parallel rank computes than the mean one, by the FLOPs of their samples: 0 is even; None
    where the model's shape was not given.
    """

    minibatches: list[MiniBatch]
    rewards: torch.Tensor
    policy_rewards: torch.Tensor
    scored: torch.Tensor
    group_ids: torch.Tensor
    points: ReadoutPoints
    rank_imbalance: float | None = None

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of all optimizer steps, in order."""
        return [micro_batch for minibatch in self.minibatches for micro_batch in minibatch.micro_batches]


def prepare_step(
    flat: FlatBatch,
    config: RunConfig,
    *,
    score_token_id: int | None,
    readouts: RunReadouts | None = None,
    data_rank: int,
    data_size: int,
    context_rank: int,
    experts: Experts | None = None,
    architecture: Architecture | None = None,
    share_prompts: bool = False,
) -> StepData:
    """Cut the rollout batch into optimizer steps, ranks and micro-batches, and pack this rank's share.

    A pure function of its arguments: every rank computes the same schedule, and the context ranks of one data rank
    pack the same micro-batches, of which each keeps its tokens. `score_token_id` None leaves the score rows out, and
    `readouts` None takes those of `config` with this token; `experts` of a model that has them, and its `architecture`,
    by which `batching.balance: flops` shares out samples. `share_prompts`: a group's prompt is packed once for all its
    responses in a micro-batch.
    """
    readouts = readouts or RunReadouts.of(config, score_token_id)
    points = readouts.points(flat)
    responses = flat.response_lengths + points.appended_tokens
    units = (
        _units(flat, responses, config, data_size)
        if share_prompts
        else [(i,) for i in range(flat.num_samples)]
    )
    costs = None
    if architecture is not None:
        costs = [_forward_flops(flat, responses, architecture, unit) for unit in units]
    elif config.batching.balance == "flops":
        raise ValueError("batching.balance: flops needs the model's architecture")
    parallel = config.parallel
    schedule = build_schedule(
        [
            padded_tokens(_tokens(flat, responses, unit), parallel) for unit in units
        ],  # as packed: the budget holds with padding
        data_parallel=data_size,
        tokens_per_micro_batch=micro_batch_tokens(config),
        minibatches=config.policy.minibatches,
        group_ids=[int(flat.group_ids[unit[0]]) for unit in units],
        # The interleaved pipeline schedule works on whole rounds of micro-batches.
        micro_batch_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        costs=costs if config.batching.balance == "flops" else None,
    )
    minibatches = []
    for ranks in schedule.minibatches:
        members = sorted(i for rank in ranks for chosen in rank for unit in chosen for i in units[unit])
        minibatches.append(
            _minibatch(
                flat,
                config,
                np.array(members, dtype=np.int64),
                [[i for unit in chosen for i in units[unit]] for chosen in ranks[data_rank]],
                readouts,
                points,
                pad=pad_multiple(config),
                context_rank=context_rank,
                experts=experts,
                share_prompts=share_prompts,
            )
        )
    learned = flat.policy_rewards if len(flat.policy_rewards) else flat.rewards
    return StepData(
        minibatches=minibatches,
        rewards=torch.from_numpy(flat.rewards.astype(np.float32)),
        policy_rewards=torch.from_numpy(learned.astype(np.float32)),
        scored=torch.from_numpy(flat.scored.astype(bool)),
        group_ids=torch.from_numpy(flat.group_ids.astype(np.int64)),
        points=points,
        rank_imbalance=None if costs is None else schedule.imbalance(costs),
    )


def _units(
    flat: FlatBatch, responses: np.ndarray, config: RunConfig, data_size: int
) -> list[tuple[int, ...]]:
    """What is scheduled as a whole where prompts are shared: groups, or pieces where ranks and stages need more.

    responses: [samples] tokens that are packed of each, with what is appended for reading.
    """
    parallel = config.parallel
    wanted = data_size * config.policy.minibatches
    # Two for each rank, that none has twice the others' work; a round of micro-batches for an interleaved pipeline.
    wanted *= 2 if data_size > 1 else 1
    wanted *= parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    return shared_units(
        flat.group_ids.tolist(),
        flat.prompt_lengths.tolist(),
        responses.tolist(),
        budget=micro_batch_tokens(config),
        least=wanted,
    )


def _tokens(flat: FlatBatch, responses: np.ndarray, unit: Sequence[int]) -> int:
    return unit_tokens(int(flat.prompt_lengths[unit[0]]), [int(responses[i]) for i in unit])


def _forward_flops(
    flat: FlatBatch, responses: np.ndarray, architecture: Architecture, unit: Sequence[int]
) -> int:
    prompt = int(flat.prompt_lengths[unit[0]])
    lengths = [prompt + int(responses[i]) for i in unit]
    alone = [
        forward_flops(architecture, length, int(flat.sampled_lengths[i]))
        for length, i in zip(lengths, unit, strict=True)
    ]
    return sum(alone) - (len(unit) - 1) * forward_flops(architecture, prompt - 1, 0)


def _minibatch(
    flat: FlatBatch,
    config: RunConfig,
    members: np.ndarray,
    own: Sequence[Sequence[int]],
    readouts: RunReadouts,
    points: ReadoutPoints,
    *,
    pad: int,
    context_rank: int,
    experts: Experts | None,
    share_prompts: bool,
) -> MiniBatch:
    num_tokens = int(flat.sampled_lengths[members].sum())
    weights = sequence_token_weights(
        torch.from_numpy(flat.sampled_lengths[members].astype(np.int64)),
        config.policy.loss_aggregation,
        num_samples=len(members),
        num_tokens=num_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    per_sample = torch.zeros(len(flat.prompt_lengths), dtype=torch.float32)
    per_sample[torch.from_numpy(members)] = weights
    counts, balanced = readouts.class_weights(flat, points, members)
    balance = None
    if experts is not None:
        balance = LoadBalance(
            aux_coefficient=config.moe.aux_loss_coefficient,
            z_coefficient=config.moe.z_loss_coefficient,
            tokens=int(flat.lengths[members].sum()),
        )
    return MiniBatch(
        micro_batches=[
            make_micro_batch(
                flat,
                samples,
                score_token_id=None,
                points=points,
                temperature=config.rollout.temperature,
                pad_multiple=pad,
                context_size=config.parallel.context,
                context_rank=context_rank,
                entropy_gradient=config.policy.entropy_coefficient != 0.0,
                experts=experts,
                replay=config.moe.routing_replay,
                balance=balance,
                share_prompts=share_prompts,
            )
            for samples in own
        ],
        num_samples=len(members),
        num_tokens=num_tokens,
        point_counts=counts,
        class_weights=balanced,
        token_weights=per_sample.to(platform.device()),
        balance=balance,
    )


def make_micro_batch(
    flat: FlatBatch,
    samples: Sequence[int],
    *,
    score_token_id: int | None,
    points: ReadoutPoints | None = None,
    temperature: float,
    pad_multiple: int,
    context_size: int = 1,
    context_rank: int = 0,
    entropy_gradient: bool = False,
    experts: Experts | None = None,
    replay: bool = False,
    balance: LoadBalance | None = None,
    share_prompts: bool = False,
) -> MicroBatch:
    """Pack the given samples of the rollout batch and place them, or a context rank's share, on the device.

    `points`: what is read of the batch, in place of `score_token_id` behind each scored response.
    `entropy_gradient`: the loss has an entropy term. `experts`: of a model that has them; `replay`: its routers are
    told what the engine chose, `balance`: and their losses. `share_prompts`: attention must be `torch_layers`'.
    """
    inputs = [flat.pack_input(index) for index in samples]
    if points is not None:
        inputs = [
            replace(item, marks=points.marks(item.sample_index), appended=points.appended(item.sample_index))
            for item in inputs
        ]
    whole = pack(
        inputs,
        score_token_id=score_token_id,
        pad_multiple=pad_multiple,
        inv_temperature=1.0 / temperature,
        context_size=context_size,
        share_prompts=share_prompts,
    )
    packed = context_shard(whole, size=context_size, rank=context_rank)
    device = platform.device()

    def put(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    cu_seqlens = put(packed.cu_seqlens, torch.int32)
    policy = ~packed.is_score
    places = flat.response_offsets[packed.sample_index[policy]] + packed.response_position[policy]
    packed_seq_params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=packed.max_seqlen,
        max_seqlen_kv=packed.max_seqlen,
        # Lengths count what was added to a sequence, so kernels have nothing to step over. Transformer Engine
        # guesses it else, and its guess changed between releases.
        pad_between_seqs=False,
    )
    position_ids = put(packed.position_ids, torch.int64)
    if packed.parents is not None:
        share_packed_prompts(packed_seq_params, packed.parents, position_ids)
    if experts is not None:
        routing = experts.routing(flat, samples, packed.cu_seqlens, replay=replay)
        routing.balance = balance
        packed_seq_params.routing = routing
    return MicroBatch(
        tokens=put(packed.tokens, torch.int64).unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        packed=packed_seq_params,
        head=HeadInputs(
            rows=put(packed.row_index, torch.int64),
            positions=packed.row_index,
            labels=put(packed.labels, torch.int64),
            inv_temperature=put(packed.inv_temperature, torch.float32),
            with_entropy=True,
            entropy_gradient=entropy_gradient,
            sets=row_sets(flat, packed, device),
        ),
        policy_rows=put(np.flatnonzero(policy), torch.int64),
        score_rows=put(np.flatnonzero(packed.is_score), torch.int64),
        policy_sample=put(packed.sample_index[policy], torch.int64),
        score_sample=put(packed.sample_index[packed.is_score], torch.int64),
        score_slot=put(packed.slot[packed.is_score], torch.int64),
        score_readout=_readout_of(packed, points),
        rollout_logprobs=put(flat.rollout_logprobs[places], torch.float32),
        policy_counts=np.concatenate(([0], np.cumsum(policy))),
        policy_places=places,
    )


def _readout_of(packed: PackedMicroBatch, points: ReadoutPoints | None) -> np.ndarray:
    slots = packed.slot[packed.is_score]
    return np.zeros_like(slots) if points is None else np.searchsorted(points.slot_starts, slots, "right") - 1


def pad_multiple(config: RunConfig) -> int:
    """What packed lengths are padded to a multiple of: `batching.pad_multiple` or its default for this device.

    On CUDA few distinct lengths keep the caching allocator from cutting its memory to pieces; on a CPU padding only
    costs. Either way lengths divide over the sequence-parallel ranks (and, in zig-zag, the context ranks).
    """
    if config.batching.pad_multiple is not None or platform.has_cuda():
        return gpu_pad_multiple(config)
    return max(2, needed_pad_multiple(config.parallel))


def check_token_ids(flat: FlatBatch, vocab_size: int) -> None:
    """Raises ValueError for a batch with a token id outside [0, vocab_size); names sample and id.

    Such an id would read another rank's embedding row, or nothing, without any error.
    """
    outside = np.flatnonzero((flat.tokens < 0) | (flat.tokens >= vocab_size))
    if not len(outside):
        return
    first = int(outside[0])
    sample = int(np.searchsorted(flat.token_offsets, first, side="right")) - 1
    part = "prompt" if first - flat.token_offsets[sample] < flat.prompt_lengths[sample] else "response"
    raise ValueError(
        f"step {flat.step}: token id {int(flat.tokens[first])} in the {part} of sample {sample}; expected 0 to "
        f"{vocab_size - 1}, the vocabulary of model.path: the rollout engine or the tokenizer belongs to "
        "another model"
    )

"""What the routers of a model with experts get with each micro-batch, and what they counted, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_laser.batching.context import context_positions
from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config import MixtureOfExperts
from megatron_laser.model import platform
from megatron_laser.model.experts import Routing, Tally


@dataclass(frozen=True)
class Experts:
    """The model's experts, and which of a micro-batch's tokens this rank's layers see.

    layers: of the whole model; own_layers: numbers, from 0, of those on this rank. context and sequence: (ranks, this
    rank) of context and of sequence parallelism, which cuts what a context rank has into equal pieces.
    """

    moe: MixtureOfExperts
    layers: int
    own_layers: tuple[int, ...]
    context: tuple[int, int] = (1, 0)
    sequence: tuple[int, int] = (1, 0)

    def check(self, flat: FlatBatch) -> None:
        """Raises ValueError for routed experts that the model does not have: they would be read as another layer's."""
        routed = flat.routed_experts
        if not len(routed):
            return
        width = self.layers * self.moe.experts_per_token
        if routed.shape[1] != width or routed.min() < 0 or routed.max() >= self.moe.num_experts:
            raise ValueError(
                f"step {flat.step}: routed experts {int(routed.min())} to {int(routed.max())}, {routed.shape[1]} a "
                f"token; expected 0 to {self.moe.num_experts - 1}, {width} a token ({self.layers} layers x "
                f"{self.moe.experts_per_token}), as model.path has: the rollout engine has another model"
            )

    def tally(self) -> Tally:
        """Zeros for the counts of a pass."""
        return Tally(self.layers, self.moe.num_experts, platform.device())

    def routing(
        self,
        flat: FlatBatch,
        samples: Sequence[int],
        cu_seqlens: npt.NDArray[np.integer],
        *,
        replay: bool,
    ) -> Routing:
        """Of the micro-batch of `samples`, whose packed sequences start at `cu_seqlens`, this rank's tokens.

        What is appended to a response for readouts is routed like any token, but, as padding, it is none of the tokens
        that are counted or that routers are trained on.
        """
        tokens = int(cu_seqlens[-1])
        real = np.zeros(tokens, dtype=np.bool_)
        source = np.full(tokens, -1, dtype=np.int64)  # rows of flat.routed_experts
        for index, start in zip(samples, cu_seqlens):
            real[start : start + flat.lengths[index]] = True
            count = int(flat.routed_tokens[index])
            source[start : start + count] = flat.routed_offsets[index] + np.arange(count)
        size, rank = self.context
        own = context_positions(cu_seqlens, size=size, rank=rank)
        size, rank = self.sequence
        own = own[len(own) // size * rank : len(own) // size * (rank + 1)]
        routing = Routing(real=_put(real[own]))
        known = source[own] >= 0
        if replay and known.any():
            routing.known = _put(known)
            chosen = flat.routed_experts[np.maximum(source[own], 0)]
            by_layer = chosen.reshape(len(own), self.layers, -1)[:, self.own_layers]
            routing.chosen = _put(by_layer.reshape(len(own), -1))
            routing.places = {layer: place for place, layer in enumerate(self.own_layers)}
        return routing


@dataclass(frozen=True)
class Counts:
    """The tallies of all ranks together, on the CPU; see `Tally`."""

    assigned: torch.Tensor
    probability: torch.Tensor
    z: torch.Tensor
    replayed: torch.Tensor
    differing: torch.Tensor

    @classmethod
    def of(cls, tallies: Iterable[Tally], group: dist.ProcessGroup | None) -> Counts:
        """The sum of the tallies and over all ranks: layers are on one pipeline stage, tokens on one rank of it."""
        tallies = list(tallies)
        sums = [sum(getattr(tally, f.name).double().cpu() for tally in tallies) for f in fields(cls)]
        flat = torch.cat([value.flatten() for value in sums])  # type: ignore[union-attr]
        if group is not None:
            dist.all_reduce(flat, group=group)
        parts = flat.split([value.numel() for value in sums])  # type: ignore[union-attr]
        return cls(*(part.view_as(value) for part, value in zip(parts, sums)))  # type: ignore[arg-type]

    def load(self) -> torch.Tensor:
        """The share of assignments that each expert got, [layers, experts] float32; even where nothing was counted."""
        total = self.assigned.sum(dim=1, keepdim=True)
        even = torch.full_like(self.assigned, 1.0 / self.assigned.shape[1])
        return torch.where(total > 0, self.assigned / total.clamp(min=1), even).float()


def expert_metrics(counts: Counts, experts_per_token: int) -> dict[str, float]:
    """What is reported of the routers in a step's updates.

    Shares are of a layer's assignments, times the number of experts: 1 is even. `expert_load_max` and `_min`: of the
    most and the least used expert of any layer; `expert_load_entropy`: mean over layers, divided by its largest value;
    `experts_idle`: experts without a token; `router_aux_loss`, `router_z_loss`: means over layers, no coefficients;
    `routing_replayed`: tokens whose experts were given; `routing_changed`: those of them, in any one layer, that the
    router itself would have sent to others. No token is dropped.
    """
    share = counts.load().double() * counts.assigned.shape[1]
    tokens = counts.assigned.sum(dim=1) / experts_per_token
    counted = tokens > 0
    if not counted.any():
        return {}
    load = (share / share.shape[1])[counted]
    entropy = -(load * load.clamp(min=1e-300).log()).sum(dim=1) / math.log(max(load.shape[1], 2))
    mean = counts.probability[counted] / tokens[counted, None]
    metrics = {
        "expert_load_max": float(share[counted].max()),
        "expert_load_min": float(share[counted].min()),
        "expert_load_entropy": float(entropy.mean()),
        "experts_idle": float((counts.assigned[counted] == 0).double().mean()),
        "router_aux_loss": float((load * mean).sum(dim=1).mul(load.shape[1]).mean()),
        "router_z_loss": float((counts.z[counted] / tokens[counted]).mean()),
    }
    replayed = float(counts.replayed.sum())
    if replayed:
        metrics["routing_replayed"] = replayed / float(tokens.sum())
        metrics["routing_changed"] = float(counts.differing.sum()) / replayed
    return metrics


def _put(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(platform.device())

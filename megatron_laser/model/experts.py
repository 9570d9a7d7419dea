"""Mixture-of-experts layers: a router that knows which tokens are real, what they weigh and where they went before.

Megatron's router computes its losses per micro-batch, over whatever tokens it sees, padding included. Here they are
sums over the real tokens of an optimizer step, divided by numbers that are known beforehand, so they do not depend on
how the batch is cut over micro-batches and ranks (`Routing`). A token can be sent to the experts that the rollout
engine chose for it (routing replay, R3, arXiv 2510.11370), through Megatron's own hook for that.

What belongs to a micro-batch comes with its `PackedSeqParams`, which every layer gets in the forward and again where
activations are recomputed, whatever other micro-batch the pipeline has started in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_layer import TransformerLayer

#: What a pass is for: the old policy's (tokens are counted), training (counted, with losses), a reference model's.
Pass = Literal["old_policy", "train", "reference"]


class Tally:
    """Sums over the real tokens of a rank's layers; all tensors are [layers of the model, ...] on the device.

    assigned [layers, experts] int64: tokens that were sent to an expert. probability [layers, experts] float64: the sum
    of the router's probabilities, all experts together 1 a token. z [layers] float64: of squared log-sum-exps.
    replayed, differing [layers] int64: tokens whose experts were given, and those of them that the router itself would
    have sent elsewhere.
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self.assigned = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self.probability = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        self.z = torch.zeros(layers, dtype=torch.float64, device=device)
        self.replayed = torch.zeros(layers, dtype=torch.int64, device=device)
        self.differing = torch.zeros(layers, dtype=torch.int64, device=device)


@dataclass
class LoadBalance:
    """The losses of the routers in one optimizer step.

    auxiliary = aux_coefficient * sum over layers of experts * sum_i f_i P_i: f_i is the share of assignments that went
    to expert i (`load` [layers, experts] float32), counted over the step's real tokens when the old policy saw them,
    P_i the mean of the router's probability over the same tokens (Switch Transformer, arXiv 2101.03961, eq. 4; over
    the global batch as in arXiv 2501.11873). z = z_coefficient * sum over layers of the mean squared log-sum-exp of
    the logits (ST-MoE, arXiv 2202.08906). Means are over `tokens`, the real tokens of all ranks.
    """

    aux_coefficient: float
    z_coefficient: float
    tokens: int
    load: torch.Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether there is a loss."""
        return self.aux_coefficient != 0.0 or self.z_coefficient != 0.0


@dataclass
class Routing:
    """What the routers need to know of one micro-batch's tokens on this rank, in the order in which they come.

    real [tokens] bool: no padding. chosen [tokens, own layers * experts_per_token] uint8 or int16: the engine's
    experts, read only where `known` [tokens] bool; None without routing replay. places: layer number, from 0, -> its
    place among the rank's own.
    """

    real: torch.Tensor
    chosen: torch.Tensor | None = None
    known: torch.Tensor | None = None
    places: Mapping[int, int] = field(default_factory=dict)
    balance: LoadBalance | None = None
    tally: Tally | None = None
    stage: Pass = "old_policy"

    @property
    def replays(self) -> bool:
        """Whether tokens go where the engine sent them: not in a reference model, which is itself."""
        return self.chosen is not None and self.stage != "reference"


class _WithLoss(torch.autograd.Function):
    """Passes `output` on and gives `loss` a gradient of 1: nothing scales losses here."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


class Replay(RouterReplay):
    """Megatron's hook for one call: the given experts where they are known, the router's own choice elsewhere.

    It is not in upstream's list of all routers, by which a whole model replays one batch at a time.
    """

    def __init__(self, chosen: torch.Tensor, known: torch.Tensor) -> None:
        """chosen [tokens, topk] int64, known [tokens] bool."""
        self._chosen, self._known = chosen, known
        self.replayed: torch.Tensor | None = None
        self.differs: torch.Tensor | None = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, experts) [tokens, topk]; notes what is `replayed`, and where that `differs` from its own."""
        _, own = default_compute_topk(scores, topk, num_groups, group_topk)
        given = self._chosen.sort(dim=1).values
        # An expert given twice would leave a token with fewer experts than its layer's exchange counts on.
        self.replayed = self._known & (given[:, 1:] != given[:, :-1]).all(dim=1)
        self.differs = self.replayed & (given != own.sort(dim=1).values).any(dim=1)
        experts = torch.where(self.replayed[:, None], self._chosen, own)
        return scores.gather(1, experts), experts


class Router(TopKRouter):
    """Softmax router without capacity: no token is dropped. `routing` says what it needs of the micro-batch."""

    current: Routing | None = None

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, whether a token goes to an expert), both [tokens, experts], of float32 logits [s, b, experts]."""
        logits = logits.view(-1, self.config.num_moe_experts)
        routing, layer = self.current, self.layer_number - 1
        replay = None
        if routing is not None and routing.replays:
            assert routing.chosen is not None and routing.known is not None
            place = routing.places[layer]
            columns = slice(place * self.topk, (place + 1) * self.topk)
            replay = Replay(routing.chosen[:, columns].to(torch.int64), routing.known)
        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function=self.score_function,
            router_replay=replay,
        )
        if routing is None:
            return probs, routing_map
        training = routing.stage == "train"
        if training and torch.is_grad_enabled() and routing.balance is not None and routing.balance.active:
            probs = _WithLoss.apply(probs, _loss(logits, routing.real, routing.balance, layer))
        # A pass that is run again for its gradients is counted then, and once.
        if routing.tally is not None and routing.stage != "reference" and torch.is_grad_enabled() == training:
            with torch.no_grad():
                _count(routing.tally, layer, logits, routing_map, routing.real, replay)
        return probs, routing_map


def _loss(logits: torch.Tensor, real: torch.Tensor, balance: LoadBalance, layer: int) -> torch.Tensor:
    loss = logits.new_zeros(())
    if balance.aux_coefficient != 0.0:
        assert balance.load is not None
        probability = (logits.softmax(dim=-1) * real[:, None]).sum(dim=0)
        load = balance.load[layer]
        loss = loss + balance.aux_coefficient * load.numel() * (load * probability).sum()
    if balance.z_coefficient != 0.0:
        loss = loss + balance.z_coefficient * (logits.logsumexp(dim=-1).square() * real).sum()
    return loss / balance.tokens


def _count(
    tally: Tally,
    layer: int,
    logits: torch.Tensor,
    routing_map: torch.Tensor,
    real: torch.Tensor,
    replay: Replay | None,
) -> None:
    tally.assigned[layer] += (routing_map & real[:, None]).sum(dim=0)
    tally.probability[layer] += (logits.softmax(dim=-1) * real[:, None]).sum(dim=0, dtype=torch.float64)
    tally.z[layer] += (logits.logsumexp(dim=-1).square() * real).sum(dtype=torch.float64)
    if replay is not None:
        assert replay.replayed is not None and replay.differs is not None
        tally.replayed[layer] += (replay.replayed & real).sum()
        tally.differing[layer] += (replay.differs & real).sum()


class ExpertLayer(MoELayer):
    """Megatron's layer, whose `padding_mask` is a micro-batch's `Routing` here, for the router."""

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output [s, b, hidden], None)."""

        def run(hidden: torch.Tensor) -> Any:
            self.router.current = padding_mask
            result = MoELayer.forward(self, hidden)
            self._let_go()
            return result

        # Megatron's own recomputation of this layer would not come by here again.
        if "mlp" in (self.config.recompute_modules or ()) and self.training and torch.is_grad_enabled():
            if self.config.fp8:  # with the other one the second run would not be in FP8
                from megatron.core.extensions.transformer_engine import te_checkpoint

                tracker = tensor_parallel.random.get_cuda_rng_tracker
                return te_checkpoint(run, False, tracker, self.tp_group, hidden_states)
            return tensor_parallel.checkpoint(run, False, hidden_states)
        return run(hidden_states)

    def _let_go(self) -> None:
        """Of what the dispatcher keeps of a pass until the next one, and nobody reads.

        Its weights are part of the graph. That would keep the inputs of layers that are run again (as much as the
        tokens, in each layer), and through hooks of parameters the model: a cycle that no collection sees.
        """
        dispatcher: Any = self.token_dispatcher
        dispatcher.probs = dispatcher.routing_map = None
        dispatcher.reversed_local_input_permutation_mapping = None


class ExpertTransformerLayer(TransformerLayer):
    """Hands the micro-batch's `Routing` from its `PackedSeqParams` to the experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream."""
        kwargs["padding_mask"] = getattr(kwargs.get("packed_seq_params"), "routing", None)
        return super().forward(*args, **kwargs)


def freeze_routers(model: torch.nn.Module) -> None:
    """Take the routers' weights out of training. Call before gradients get their buffers."""
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.requires_grad_(False)

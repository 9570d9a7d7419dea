"""A model with experts trained plainly: transformers' layers, routers written from the papers' formulas."""

from types import MethodType

import torch

from helpers.plain_training import PlainTrainer


class PlainExpertsTrainer(PlainTrainer):
    """Adds the routers' losses, and sends tokens where a batch says so.

    Everything that the routers saw is in `seen` {sample: [layer: (logits, experts, own choice)]} of the last forward
    with gradients, and in `before` of the one without, before the update.
    """

    def __init__(self, model, settings, *, aux_coefficient=0.0, z_coefficient=0.0, replay=False):
        super().__init__(model, settings)
        self.aux_coefficient, self.z_coefficient, self.replay = aux_coefficient, z_coefficient, replay
        self.topk = model.config.num_experts_per_tok
        self.normalised = getattr(model.config, "norm_topk_prob", True)
        self.layers = [layer.mlp.gate for layer in model.model.layers]
        self.chosen, self.records = None, []
        self.seen, self.before = {}, {}
        for number, gate in enumerate(self.layers):
            gate.forward = MethodType(lambda gate, hidden, n=number: self.route(gate, hidden, n), gate)

    def route(self, gate, hidden, number):
        """(logits, weights, experts) of transformers' router, and a note of them."""
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
        probs = logits.softmax(-1)
        own = probs.topk(self.topk, dim=-1).indices
        experts = own
        if self.chosen is not None:
            given = self.chosen[:, number]
            experts = torch.cat([given, own[len(given) :]])
        weights = probs.gather(1, experts)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        self.records.append((logits, experts, own))
        return logits, weights, experts

    def rows(self, model, flat, i):
        if model is not self.model:  # the reference's routers are transformers' own
            return super().rows(model, flat, i)
        self.records, self.chosen = [], None
        if self.replay and flat.routed_tokens[i]:
            start = flat.routed_offsets[i]
            rows = flat.routed_experts[start : start + flat.routed_tokens[i]]
            self.chosen = torch.from_numpy(rows.astype("int64")).view(len(rows), -1, self.topk)
        result = super().rows(model, flat, i)
        (self.seen if torch.is_grad_enabled() else self.before)[i] = self.records
        return result

    def more_losses(self, flat, members):
        total = 0.0
        tokens = sum(int(flat.lengths[i]) for i in members)
        for layer in range(len(self.layers)):
            experts = self.layers[layer].weight.shape[0]
            counts = torch.zeros(experts, dtype=torch.float64)
            for i in members:
                counts += torch.bincount(self.before[i][layer][1].flatten(), minlength=experts)
            load = counts / counts.sum()
            logits = torch.cat([self.seen[i][layer][0] for i in members]).double()
            mean = logits.softmax(-1).sum(0) / tokens
            total = total + self.aux_coefficient * experts * (load * mean).sum()
            total = total + self.z_coefficient * logits.logsumexp(-1).square().sum() / tokens
        return total

    def metrics(self, flat):
        """Of the last update over the whole batch: what `expert_metrics` reports."""
        everyone = range(flat.num_samples)
        found = {name: [] for name in ("most", "least", "entropy", "idle", "aux", "z")}
        replayed = differing = tokens = 0
        for layer in range(len(self.layers)):
            experts = self.layers[layer].weight.shape[0]
            records = [self.seen[i][layer] for i in everyone]
            counts = sum(
                torch.bincount(chosen.flatten(), minlength=experts) for _, chosen, _ in records
            ).double()
            load = counts / counts.sum()
            logits = torch.cat([logits for logits, _, _ in records]).detach().double()
            found["most"].append(load.max() * experts)
            found["least"].append(load.min() * experts)
            found["entropy"].append(
                -torch.special.xlogy(load, load).sum() / torch.tensor(float(experts)).log()
            )
            found["idle"].append((counts == 0).double().mean())
            found["aux"].append(experts * (load * logits.softmax(-1).mean(0)).sum())
            found["z"].append(logits.logsumexp(-1).square().mean())
            tokens += len(logits)
            for i, (_, chosen, own) in zip(everyone, records):
                known = int(flat.routed_tokens[i]) if self.replay else 0
                replayed += known
                differing += sum(
                    set(a) != set(b) for a, b in zip(chosen[:known].tolist(), own[:known].tolist())
                )
        mean = {name: float(torch.stack(values).mean()) for name, values in found.items()}
        metrics = {
            "expert_load_max": float(max(found["most"])),
            "expert_load_min": float(min(found["least"])),
            "expert_load_entropy": mean["entropy"],
            "experts_idle": mean["idle"],
            "router_aux_loss": mean["aux"],
            "router_z_loss": mean["z"],
        }
        if replayed:
            metrics |= {"routing_replayed": replayed / tokens, "routing_changed": differing / replayed}
        return metrics

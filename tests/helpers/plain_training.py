"""GRPO and LaSeR written plainly: a transformers model, one forward per sample, torch's AdamW, Python loops.

Slow and short on purpose: it is what the trainer is compared with. Losses are written from the papers'
formulas in float64; only the model computes in float32.
"""

import math
from dataclasses import dataclass

import torch

from helpers.runs import SCORE_TOKEN
from megatron_laser.batching.flat import FlatBatch

# Of both trainers, under the names of the configuration and of `Plain`.
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 0.5, "eps": 1e-5}
LASER = {
    "score_token": SCORE_TOKEN,
    "ref_logprob": -6.0,
    "beta": 0.4,
    "alpha": 0.5,
    "tau": 0.3,
    "std_threshold": 0.02,
}
AT_ONCE = {"reasoning_warmup_steps": 0, "self_reward_warmup_steps": 0}
TOKEN_MEANS = ("entropy", "clip_fraction", "approx_kl")


@dataclass
class Plain:
    """Settings, under the names of the configuration."""

    lr: float
    weight_decay: float
    grad_clip: float
    temperature: float
    old_logprobs: str
    score_token: int | None = None
    ref_logprob: float = -6.0
    beta: float = 0.4
    targets: tuple[float, float] = (1.0, 0.0)
    alpha: float = 0.0
    tau: float = 0.0
    std_threshold: float = 0.0
    clip: float = 0.2
    eps: float = 1e-8
    minibatches: int = 1
    epochs: int = 1
    advantage: str = "grpo"
    loss_aggregation: str = "token_mean"
    max_new_tokens: int = 64
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    importance_cap: float | None = None
    reference: torch.nn.Module | None = None


class PlainTrainer:
    """Trains `model` in place."""

    def __init__(self, model: torch.nn.Module, settings: Plain) -> None:
        self.model = model
        self.settings = settings
        # Norms and biases take no weight decay.
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            eps=settings.eps,
        )

    def rows(self, model: torch.nn.Module, flat: FlatBatch, i: int):
        """float64 log-softmax: [response, vocab] at the temperature, and [vocab] behind the response at 1."""
        prompt, response = flat.prompt_ids(i).tolist(), flat.response_ids(i).tolist()
        logits = model(torch.tensor([prompt + response])).logits[0].double()
        policy = (logits[len(prompt) - 1 : -1] / self.settings.temperature).log_softmax(-1)
        return policy, logits[-1].log_softmax(-1)

    def logprobs(self, model: torch.nn.Module, flat: FlatBatch, i: int):
        """Log-probs of sampled response tokens, their rows' entropies, and log pi(z_c) behind the response."""
        policy, last = self.rows(model, flat, i)
        ids = torch.from_numpy(flat.response_ids(i).astype("int64"))
        zc = None if self.settings.score_token is None else last[self.settings.score_token]
        logprobs, entropies = policy.gather(1, ids[:, None]).squeeze(1), -(policy.exp() * policy).sum(-1)
        mask = sampled_of(flat, i)
        return logprobs[mask], entropies[mask], zc

    def step(self, flat: FlatBatch, *, with_loss: bool, with_mixing: bool) -> dict:
        """One rollout batch; losses are means over the optimizer steps, TOKEN_MEANS over all their tokens."""
        s, count = self.settings, flat.num_samples
        with torch.no_grad():
            before = [self.logprobs(self.model, flat, i) for i in range(count)]
            frozen = [self.logprobs(s.reference, flat, i) if s.reference else None for i in range(count)]
        scores = [
            (s.beta * (float(before[i][2]) - s.ref_logprob) - s.targets[1]) / (s.targets[0] - s.targets[1])
            if s.score_token and flat.scored[i]
            else math.nan
            for i in range(count)
        ]
        advantages = self.advantages(flat, scores, with_mixing)
        groups = sorted(set(flat.group_ids.tolist()))
        size = len(groups) // s.minibatches
        sums = dict.fromkeys(("policy_loss", "self_reward_loss", "kl_loss", "grad_norm"), 0.0)
        token_sums, tokens = dict.fromkeys(TOKEN_MEANS, 0.0), 0
        for m in list(range(s.minibatches)) * s.epochs:
            chosen = groups[m * size : (m + 1) * size]
            members = [i for i in range(count) if flat.group_ids[i] in chosen]
            values = self.update(flat, members, advantages, before, frozen, with_loss)
            for name in sums:
                sums[name] += values[name] / (s.minibatches * s.epochs)
            for name in TOKEN_MEANS:
                token_sums[name] += values[name]
            tokens += sum(int(sampled_of(flat, i).sum()) for i in members)
        token_means = {name: value / tokens for name, value in token_sums.items()}
        return sums | token_means | {"scores": scores, "advantages": advantages}

    def advantages(self, flat: FlatBatch, scores: list[float], with_mixing: bool) -> list[float]:
        s = self.settings
        verifier = self.verifier_advantages(flat)
        result = list(verifier)
        for group in set(flat.group_ids.tolist()) if with_mixing else ():
            members = [i for i in range(flat.num_samples) if flat.group_ids[i] == group]
            clamped = [min(max(scores[i], 0.0), 1.0) if flat.scored[i] else 0.0 for i in members]
            if unbiased_std(clamped) > s.std_threshold:
                for i, own in zip(members, standardised(clamped, 0.0)):
                    result[i] = (1 - s.tau) * verifier[i] + s.tau * own
        return result

    def verifier_advantages(self, flat: FlatBatch) -> list[float]:
        kind = self.settings.advantage
        result = [0.0] * flat.num_samples
        for group in set(flat.group_ids.tolist()):
            members = [i for i in range(flat.num_samples) if flat.group_ids[i] == group]
            rewards = [float(flat.rewards[i]) for i in members]
            mean = sum(rewards) / len(rewards)
            scaled = standardised(rewards, 1e-6)
            for i, reward, grpo in zip(members, rewards, scaled):
                others = (sum(rewards) - reward) / (len(rewards) - 1)
                result[i] = {"grpo": grpo, "rloo": reward - others}.get(kind, reward - mean)
        return standardised(result, 1e-6) if kind == "reinforce_pp" else result

    def update(self, flat, members, advantages, before, frozen, with_loss) -> dict[str, float]:
        s = self.settings
        lengths = {i: int(sampled_of(flat, i).sum()) for i in members}
        row_weight = {  # of every token of response i
            "token_mean": lambda i: 1 / sum(lengths.values()),
            "sequence_mean_token_mean": lambda i: 1 / (len(members) * max(lengths[i], 1)),
            "sequence_mean_token_sum": lambda i: 1 / len(members),
            "constant_length": lambda i: 1 / (len(members) * s.max_new_tokens),
        }[s.loss_aggregation]
        scored = [i for i in members if flat.scored[i]]
        right = sum(flat.rewards[i] > 0.5 for i in scored)
        class_weight = {
            True: len(scored) / (2 * max(right, 1)),
            False: len(scored) / (2 * max(len(scored) - right, 1)),
        }
        self.optimizer.zero_grad()
        policy_loss = self_reward_loss = kl_loss = entropy = torch.zeros((), dtype=torch.float64)
        token_sums = dict.fromkeys(TOKEN_MEANS, 0.0)
        for i in members:
            logprobs, entropies, zc = self.logprobs(self.model, flat, i)
            start = flat.response_offsets[i]
            end = start + flat.response_lengths[i]
            rollout = torch.from_numpy(flat.rollout_logprobs[start:end]).double()[sampled_of(flat, i)]
            old = {"rollout": rollout, "recompute": before[i][0], "on_policy": logprobs.detach()}[
                s.old_logprobs
            ]
            ratio = (logprobs - old).exp()
            plain, clipped = ratio * advantages[i], ratio.clamp(1 - s.clip, 1 + s.clip) * advantages[i]
            surrogate = torch.minimum(plain, clipped)
            # An advantage of 1e-17 is a zero that was rounded.
            token_sums["clip_fraction"] += float((clipped < plain - 1e-12).sum())
            token_sums["approx_kl"] += float((ratio - 1 - (logprobs - old)).detach().sum())
            token_sums["entropy"] += float(entropies.detach().sum())
            if s.importance_cap is not None:
                surrogate = surrogate * (old - rollout).exp().clamp(max=s.importance_cap)
            policy_loss = policy_loss - surrogate.sum() * row_weight(i)
            entropy = entropy + entropies.sum() * row_weight(i)
            if s.reference is not None:
                log_ratio = frozen[i][0] - logprobs  # k3: pi_ref / pi - 1 - log(pi_ref / pi)
                kl_loss = kl_loss + (log_ratio.exp() - 1 - log_ratio).sum() * row_weight(i)
            if s.score_token is not None and flat.scored[i]:
                target = s.targets[0] if flat.rewards[i] > 0.5 else s.targets[1]
                error = (s.beta * (zc - s.ref_logprob) - target) ** 2
                self_reward_loss = self_reward_loss + class_weight[flat.rewards[i] > 0.5] * error / len(
                    scored
                )
        total = policy_loss + s.kl_coefficient * kl_loss - s.entropy_coefficient * entropy
        if with_loss:
            total = total + s.alpha * self_reward_loss
        total = total + self.more_losses(flat, members)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        self.optimizer.step()
        return {
            "policy_loss": policy_loss.item(),
            "self_reward_loss": self_reward_loss.item(),
            "kl_loss": kl_loss.item(),
            "grad_norm": norm.item(),
        } | token_sums

    def more_losses(self, flat, members) -> torch.Tensor | float:
        """What a kind of model adds to the loss of one update, after the forwards of `members`."""
        return 0.0


def sampled_of(flat: FlatBatch, i: int) -> torch.Tensor:
    """[tokens] bool: the response tokens that the policy sampled, and not an environment."""
    start, length = int(flat.response_offsets[i]), int(flat.response_lengths[i])
    if not len(flat.sampled):
        return torch.ones(length, dtype=torch.bool)
    return torch.tensor([bool(flat.sampled[start + t]) for t in range(length)], dtype=torch.bool)


def unbiased_std(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def standardised(values: list[float], epsilon: float) -> list[float]:
    mean, std = sum(values) / len(values), unbiased_std(values)
    return [0.0 if std == 0.0 else (v - mean) / (std + epsilon) for v in values]

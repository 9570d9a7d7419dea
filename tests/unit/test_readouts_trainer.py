"""A train step with every kind of readout and policy loss equals a plain computation, one sample at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config

from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer.objective import Objective  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

GROUPS = [
    [Response(5, True), Response(9, False), Response(7, False, truncated=True)],
    [Response(4, True), Response(1, False), Response(6, True)],
]
A, B, C = (SCORE_TOKEN - 1, SCORE_TOKEN - 2, SCORE_TOKEN - 3)
READOUTS = [
    {"advantages": "mix", "tau": 0.3, "std_threshold": 0.0},
    {"name": "pair", "tokens": [A, B], "position": "before_eos", "score": "pair_sigmoid", "loss": "bce"}
    | {"target": {"group_shrunk": 0.7}, "advantages": "discrepancy", "kappa": 1.5, "weight": 0.7},
    {"name": "prefix", "tokens": [A, B, C], "position": {"every": 3}, "score": "normalised", "loss": "brier"}
    | {"target": "prefix_value", "class_weights": False, "weight": 0.4},
    {"name": "sft", "tokens": [A, C], "loss": "bce", "weight": 0.2},
    {"name": "margin", "tokens": B, "ref_logprob": -7.0, "loss": "margin", "margin": 0.9, "weight": 0.3},
]
LASER = {"alpha": 0.5, "beta": 0.4, "reasoning_warmup_steps": 0, "self_reward_warmup_steps": 0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readouts") / "model"
    tiny_model("qwen2").save_pretrained(folder)
    return folder


def trainer_of(folder, model_folder, runtime, *, policy, readouts=None, **sections):
    laser = LASER | ({} if readouts is None else {"readouts": readouts})
    config = run_config(folder, model_folder, policy=policy, laser=laser, **sections)
    return Trainer(config, runtime, score_token_id=SCORE_TOKEN)


class Read:
    """The model's log-probs of one sample, in float64 with gradients."""

    def __init__(self, model, flat, i):
        self.prompt, self.ids = len(flat.prompt_ids(i)), flat.response_ids(i).tolist()
        logits = model(torch.tensor([[*flat.prompt_ids(i).tolist(), *self.ids]])).logits[0].double()
        self.rows = logits[self.prompt - 1 :].log_softmax(-1)  # row o: behind o tokens of the response
        self.logprobs = self.rows[:-1].gather(1, torch.tensor(self.ids)[:, None])[:, 0]
        start = flat.response_offsets[i]
        self.rollout = torch.from_numpy(flat.rollout_logprobs[start : start + len(self.ids)]).double()


def balanced(points, right):
    """(right, wrong) class weights of some points."""
    count = sum(right)
    return len(points) / (2 * max(count, 1)), len(points) / (2 * max(len(points) - count, 1))


def plain_losses(reads, flat):
    """name -> loss, of READOUTS by their formulas."""
    rewards, groups = flat.rewards.tolist(), flat.group_ids.tolist()
    mean = {g: sum(r for r, h in zip(rewards, groups) if h == g) / groups.count(g) for g in groups}
    scored = [i for i in range(len(reads)) if flat.scored[i]]
    right = [rewards[i] > 0.5 for i in scored]
    weights = [balanced(scored, right)[0 if one else 1] for one in right]

    def total(row_losses):
        return sum(w * x for w, x in zip(weights, row_losses)) / len(scored)

    found = {}
    end = [reads[i].rows[-1] for i in scored]
    before = [reads[i].rows[-2] for i in scored]
    found["first"] = total([(0.4 * (e[SCORE_TOKEN] + 6.0) - rewards[i]) ** 2 for e, i in zip(end, scored)])
    labels = [0.7 * rewards[i] + 0.3 * mean[groups[i]] for i in scored]
    shares = [torch.sigmoid(row[A] - row[B]) for row in before]
    found["pair"] = total([-t * c.log() - (1 - t) * (1 - c).log() for t, c in zip(labels, shares)])
    found["sft"] = total([-rewards[i] * e[A] - (1 - rewards[i]) * e[C] for e, i in zip(end, scored)])
    margins = [(2 * rewards[i] - 1) * (2 * 0.4 * (e[B] + 7.0) - 1) for e, i in zip(end, scored)]
    found["margin"] = total([(0.9 - m).clamp(min=0) for m in margins])
    brier = []
    for i, read in enumerate(reads):
        for o in range(3, len(read.ids), 3):
            same = [
                j for j in range(len(reads)) if groups[j] == groups[i] and reads[j].ids[:o] == read.ids[:o]
            ]
            value = sum(rewards[j] for j in same) / len(same)
            p = read.rows[o].exp()
            brier.append((p[A] / (p[A] + p[B] + p[C]) - value) ** 2)
    found["prefix"] = sum(brier) / len(brier)
    scores = {i: float(0.4 * (e[SCORE_TOKEN] + 6.0)) for e, i in zip(end, scored)}
    return found, scores, {i: float(c) for i, c in zip(scored, shares)}


def unbiased(values):
    m = sum(values) / len(values)
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1))


def plain_advantages(flat, scores, shares):
    """GRPO, then A_s mixed in, then weighted by how far the pair's score is from the label."""
    result = [0.0] * flat.num_samples
    for group in sorted(set(flat.group_ids.tolist())):
        members = [i for i in range(flat.num_samples) if flat.group_ids[i] == group]
        mean, std = unbiased([float(flat.rewards[i]) for i in members])
        clamped = [min(max(scores.get(i, 0.0), 0.0), 1.0) for i in members]
        own_mean, own_std = unbiased(clamped)
        distance = {i: abs(float(flat.rewards[i]) - shares[i]) for i in members if i in shares}
        center = sum(distance.values()) / len(distance)
        for i, own in zip(members, clamped):
            verifier = (float(flat.rewards[i]) - mean) / (std + 1e-6)
            mixed = 0.7 * verifier + 0.3 * (own - own_mean) / own_std if own_std > 0 else verifier
            weight = min(max(1 + 1.5 * (distance[i] - center), 0.5), 2.0) if i in distance else 1.0
            result[i] = mixed * weight
    return result


def test_a_step_with_all_readouts_equals_a_plain_computation(tmp_path, model_folder, single_process):
    flat = rollout_batch(GROUPS)
    trainer = trainer_of(
        tmp_path, model_folder, single_process, policy={"old_logprobs": "rollout"}, readouts=READOUTS
    )
    result = trainer.train_step(flat, 1)

    model = tiny_model("qwen2")
    reads = [Read(model, flat, i) for i in range(flat.num_samples)]
    losses, scores, shares = plain_losses(reads, flat)
    advantages = plain_advantages(flat, scores, shares)
    assert result.advantages.tolist() == pytest.approx(advantages, abs=2e-5)
    tokens = sum(len(read.ids) for read in reads)
    policy = 0.0
    for read, a in zip(reads, advantages):
        ratio = (read.logprobs - read.rollout).exp()
        policy = policy - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / tokens
    assert result.metrics["policy_loss"] == pytest.approx(float(policy), rel=2e-5, abs=1e-6)
    assert result.metrics["self_reward_loss"] == pytest.approx(float(losses["first"]), rel=2e-5)
    for name in ("pair", "prefix", "sft", "margin"):
        assert result.metrics[f"readout/{name}/loss"] == pytest.approx(float(losses[name]), rel=2e-5), name
    weights = {"first": 0.5, "pair": 0.7, "prefix": 0.4, "sft": 0.2, "margin": 0.3}
    total = policy + sum(weights[name] * loss for name, loss in losses.items())
    assert result.metrics["total_loss"] == pytest.approx(float(total), rel=2e-5)
    total.backward()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    assert result.metrics["grad_norm"] == pytest.approx(float(norm), rel=2e-5)
    pair = result.readouts[1]
    assert pair.scores.tolist() == pytest.approx([shares[i] for i in pair.sample.tolist()], rel=1e-5)


@pytest.mark.parametrize("budget", [128, 4096])
@pytest.mark.parametrize("loss", ["gspo", "cispo", "gmpo", "sapo"])
def test_a_step_of_each_policy_loss_equals_a_plain_computation(
    tmp_path, model_folder, single_process, loss, budget
):
    """With weights of whole responses on top; samples in several micro-batches or in one."""
    flat = rollout_batch(GROUPS)
    policy = {"loss": loss, "loss_aggregation": "sequence_mean_token_mean", "epochs": 2}
    policy |= {"importance_level": "sequence", "importance_cap": 1.5, "importance_mask": [0.2, 8.0]}
    trainer = Trainer(
        run_config(
            tmp_path,
            model_folder,
            policy=policy,
            laser={"enabled": False},
            batching={"tokens_per_micro_batch": budget},
            optimizer={"lr": 1e-3, "grad_clip": 0.0, "weight_decay": 0.0, "eps": 1e-3},
        ),
        single_process,
        score_token_id=None,
    )
    result = trainer.train_step(flat, 1)

    model, values, norms = tiny_model("qwen2"), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-3)
    with torch.no_grad():
        old = [Read(model, flat, i).logprobs for i in range(flat.num_samples)]
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for i, before in enumerate(old):
            read, a = Read(model, flat, i), float(result.advantages[i])
            weight = math.exp(float((before - read.rollout).sum()))
            weight = min(weight, 1.5) if 0.2 <= weight <= 8.0 else 0.0
            ratio = (read.logprobs - before).exp()
            if loss == "gspo":
                s = ratio.log().mean().exp()
                own = -torch.minimum(s * a, s.clamp(0.8, 1.2) * a)
            elif loss == "cispo":
                own = -(ratio.detach().clamp(0.8, 1.2) * a * read.logprobs).mean()
            elif loss == "gmpo":
                own = -a * (ratio.clamp(max=1.2) if a > 0 else ratio.clamp(min=0.8)).log().mean().exp()
            else:
                tau = 1.0 if a > 0 else 1.05
                own = -(4 / tau * torch.sigmoid(tau * (ratio - 1)) * a).mean()
            total = total + weight * own / flat.num_samples
        total.backward()
        norms.append(torch.stack([p.grad.double().norm() for p in model.parameters()]).norm())
        optimizer.step()
        values.append(float(total))
    assert result.metrics["policy_loss"] == pytest.approx(sum(values) / 2, rel=5e-5, abs=1e-6)
    assert result.metrics["grad_norm"] == pytest.approx(float(sum(norms)) / 2, rel=5e-5)


def test_terms_for_length_change_advantages_and_not_what_the_score_learns(
    tmp_path, model_folder, single_process
):
    flat = rollout_batch(GROUPS)
    shaped = trainer_of(
        tmp_path / "shaped",
        model_folder,
        single_process,
        policy={"overlong_buffer": 5, "overlong_penalty": 0.5, "length_penalty": 0.2},
        rollout={"max_new_tokens": 9},
    ).train_step(flat, 1)
    plain = trainer_of(tmp_path / "plain", model_folder, single_process, policy={}).train_step(flat, 1)
    assert not torch.allclose(shaped.advantages, plain.advantages)
    assert shaped.metrics["self_reward_loss"] == plain.metrics["self_reward_loss"]


def test_a_response_that_a_function_cut_off_has_the_overlong_penalty(tmp_path, model_folder, single_process):
    """Four right responses far below max_new_tokens, of which the second was cut off: its reward is 1 - 0.8."""
    flat = rollout_batch(
        [[Response(3, True), Response(4, True, truncated=True), Response(5, True), Response(2, True)]]
    )
    assert flat.truncated.tolist() == [False, True, False, False]
    policy = {
        "overlong_buffer": 4,
        "overlong_penalty": 0.8,
        "advantage": "dr_grpo",
        "old_logprobs": "rollout",
    }
    result = trainer_of(
        tmp_path, model_folder, single_process, policy=policy, readouts=[{"tau": 0.0}]
    ).train_step(flat, 1)
    assert result.advantages.tolist() == pytest.approx([0.2, -0.6, 0.2, 0.2], abs=1e-6)
    flat = replace(flat, truncated=np.zeros(0, np.bool_))  # a batch of an earlier version: 4 of 64 tokens
    result = trainer_of(
        tmp_path, model_folder, single_process, policy=policy, readouts=[{"tau": 0.0}]
    ).train_step(flat, 1)
    assert result.advantages.tolist() == [0.0] * 4


def test_the_length_reward_is_of_what_the_policy_wrote(tmp_path, model_folder):
    """Two right responses of ten tokens, of which an environment wrote eight of the second."""
    config = run_config(
        tmp_path,
        model_folder,
        policy={"length_penalty": 1.0, "normalize_std": False},
        laser={"enabled": False},
    )
    found, _ = Objective(config).advantages(
        rewards=torch.ones(2),
        group_ids=torch.zeros(2, dtype=torch.int64),
        lengths=torch.tensor([10, 10]),
        sampled_lengths=torch.tensor([10, 2]),
        truncated=torch.zeros(2, dtype=torch.bool),
        scores=[],
        step=1,
    )
    assert found.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_reaches_no_function_of_the_users(tmp_path, model_folder, bad):
    file = tmp_path / "mine.py"
    file.write_text("def twice(batch):\n    return 2 * batch.advantages + 0 * batch.scores\n")
    readouts = [{"advantages": f"{file}:twice"}]
    config = run_config(tmp_path, model_folder, policy={}, laser=LASER | {"readouts": readouts})

    def advantages(score):
        return Objective(config).advantages(
            rewards=torch.tensor([1.0, 0.0]),
            group_ids=torch.zeros(2, dtype=torch.int64),
            lengths=torch.tensor([3, 3]),
            sampled_lengths=torch.tensor([3, 3]),
            truncated=torch.zeros(2, dtype=torch.bool),
            scores=[(torch.tensor([0.5, score]), torch.ones(2, dtype=torch.bool))],
            step=1,
        )[0]

    torch.testing.assert_close(advantages(bad), advantages(0.2) / 2)

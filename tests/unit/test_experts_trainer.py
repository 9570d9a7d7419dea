"""Training with experts against transformers' layers with routers written plainly, on one process."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.breadth import combinations
from helpers.models import disk_tensors
from helpers.plain_experts import PlainExpertsTrainer
from helpers.plain_training import Plain
from helpers.rollouts import STEPS, Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from megatron_laser.model import platform

platform.install()

from megatron_laser.benchmarks.random_model import save_random_model  # noqa: E402
from megatron_laser.model.experts import Replay, Router  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

LAYERS, EXPERTS, TOPK = 2, 8, 2
_SIZES = dict(
    vocab_size=250,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=TOPK,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)
_QWEN = dict(intermediate_size=64, moe_intermediate_size=16, head_dim=8, num_experts=EXPERTS)
FAMILIES = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_QWEN, norm_topk_prob=True),
    "qwen3_moe, probabilities of all": lambda: Qwen3MoeConfig(**_SIZES, **_QWEN, norm_topk_prob=False),
    "mixtral": lambda: MixtralConfig(**_SIZES, intermediate_size=16, num_local_experts=EXPERTS),
}
LASER = dict(score_token=SCORE_TOKEN, ref_logprob=-6.0, beta=0.4, alpha=0.5, tau=0.3, std_threshold=0.02)
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 0.5, "eps": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("experts")
    for name, config in FAMILIES.items():
        save_random_model(base / name, config(), spread=0.15, vector_spread=0.2)
    return base


def routed(flat, step):
    """The batch with the experts that an engine chose, at random: not of every sample, and not of its last token."""
    rng = np.random.default_rng(step)
    counts = np.where(np.arange(flat.num_samples) % 5 == 0, 0, flat.lengths - 1).astype(np.int32)
    chosen = rng.random((counts.sum(), LAYERS, EXPERTS)).argsort(-1)[..., :TOPK].astype(np.uint8)
    return replace(flat, routed_tokens=counts, routed_experts=chosen.reshape(len(chosen), -1))


CASES = {
    "qwen3_moe": dict(family="qwen3_moe"),
    "probabilities of all experts": dict(family="qwen3_moe, probabilities of all"),
    "mixtral": dict(family="mixtral"),
    "losses of routers": dict(family="qwen3_moe", aux=0.3, z=0.05),
    "losses of routers, two updates": dict(family="mixtral", aux=0.3, z=0.05, minibatches=2),
    "replay": dict(family="qwen3_moe", replay=True),
    "replay with losses, all experts' probabilities": dict(
        family="qwen3_moe, probabilities of all", aux=0.3, z=0.05, replay=True
    ),
    "losses without an old-policy pass": dict(
        family="qwen3_moe", aux=0.3, old_logprobs="on_policy", laser=False
    ),
}


@combinations(
    lambda case, cut: (
        cut == "whole" or case.startswith("replay with losses") or (case, cut) == ("mixtral", "mlp")
    ),
    case=CASES,
    cut={"whole": ("none", 4096), "mlp": ("mlp", 128), "full": ("full", 128)},
)
def test_two_steps_equal_a_plain_implementation(single_process, folders, tmp_path, case, cut):
    recompute, budget = cut
    folder, minibatches = folders / case["family"], case.get("minibatches", 1)
    old_logprobs, laser = case.get("old_logprobs", "recompute"), case.get("laser", True)
    warmups = {"reasoning_warmup_steps": 0, "self_reward_warmup_steps": 0}
    config = run_config(
        tmp_path,
        folder,
        f"batching.tokens_per_micro_batch={budget}",
        f"model.recompute={recompute}",
        laser=LASER | warmups if laser else {"enabled": False},
        optimizer=OPTIMIZER,
        policy={"old_logprobs": old_logprobs, "minibatches": minibatches},
        moe={
            "aux_loss_coefficient": case.get("aux", 0.0),
            "z_loss_coefficient": case.get("z", 0.0),
            "routing_replay": case.get("replay", False),
        },
    )
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN if laser else None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = dict(lr=1e-3, weight_decay=0.1, grad_clip=0.5, eps=1e-5, temperature=1.0)
    plain = PlainExpertsTrainer(
        model,
        Plain(**settings, old_logprobs=old_logprobs, minibatches=minibatches, **(LASER if laser else {})),
        aux_coefficient=case.get("aux", 0.0),
        z_coefficient=case.get("z", 0.0),
        replay=case.get("replay", False),
    )
    for step, groups in enumerate(STEPS[:2], start=1):
        flat = rollout_batch(groups, seed=step)
        if case.get("replay"):
            flat = routed(flat, step)
        metrics = trainer.train_step(flat, step).metrics
        expected = plain.step(flat, with_loss=laser, with_mixing=laser)
        for name in ("policy_loss", "grad_norm", "entropy", *(["self_reward_loss"] if laser else [])):
            assert metrics[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-6), (step, name)
        if minibatches == 1:
            for name, value in plain.metrics(flat).items():
                assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
            assert ("routing_changed" in metrics) == bool(case.get("replay"))
    exported, weights = dict(trainer.weight_stream()), disk_tensors(model)
    assert exported.keys() == weights.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(
            tensor, weights[name], rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_a_model_is_let_go_of_with_its_trainer(single_process, folders, tmp_path, recompute):
    """Nothing of a step's graph stays: it would hold inputs of layers, and the model for good."""
    config = run_config(tmp_path, folders / "qwen3_moe", f"model.recompute={recompute}", laser=LASER)
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    trainer.train_step(rollout_batch(STEPS[0], seed=1), 1)
    (model,) = trainer.policy.chunks.models
    kept = [
        (type(module).__name__, name)
        for module in model.modules()
        for part in (module, getattr(module, "token_dispatcher", None))
        for name, value in vars(part or module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    assert kept == []
    gone = weakref.ref(model)
    del trainer, model
    gc.collect()
    assert gone() is None


def test_a_frozen_router_keeps_its_weights_and_takes_no_part_in_the_norm(single_process, folders, tmp_path):
    folder = folders / "qwen3_moe"
    optimizer = OPTIMIZER | {
        "grad_clip": 100.0
    }  # clipping would scale the gradients that are looked at below
    config = run_config(tmp_path, folder, laser=LASER, optimizer=optimizer, moe={"freeze_router": True})
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    before = {name: tensor.clone() for name, tensor in trainer.weight_stream()}
    metrics = trainer.train_step(rollout_batch(STEPS[0], seed=1), 1).metrics
    after = dict(trainer.weight_stream())
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(routers) == LAYERS
    assert {name for name in before if torch.equal(before[name], after[name])} == routers

    trained = Trainer(
        run_config(tmp_path, folder, laser=LASER, optimizer=optimizer),
        single_process,
        score_token_id=SCORE_TOKEN,
    )
    whole = trained.train_step(rollout_batch(STEPS[0], seed=1), 1).metrics["grad_norm"]
    parts = [
        module.weight.main_grad.norm() ** 2
        for model in trained.policy.chunks.models
        for module in model.modules()
        if isinstance(module, Router)
    ]
    assert metrics["grad_norm"] == pytest.approx(float(whole**2 - sum(parts)) ** 0.5, rel=1e-4)


def test_a_token_given_one_expert_twice_goes_where_the_router_sends_it():
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2]])
    replay = Replay(torch.tensor([[0, 0], [2, 0], [1, 2]]), torch.tensor([True, True, False]))
    found, experts = replay.get_replay_topk(scores, 2, default_compute_topk=lambda s, k, *_: s.topk(k, dim=1))
    assert experts.tolist() == [[1, 2], [2, 0], [0, 1]]
    assert torch.equal(found, scores.gather(1, experts))
    assert replay.replayed.tolist() == [False, True, False] == replay.differs.tolist()


@pytest.mark.parametrize("width, highest", [(LAYERS * TOPK, EXPERTS), (LAYERS * TOPK + 1, 0)])
def test_experts_that_the_model_does_not_have_are_refused(single_process, folders, tmp_path, width, highest):
    config = run_config(tmp_path, folders / "qwen3_moe", laser=LASER, moe={"routing_replay": True})
    flat = rollout_batch([[Response(3, True), Response(4, False)]], seed=1)
    counts = flat.lengths.astype(np.int32)
    routed_experts = np.full((counts.sum(), width), highest, dtype=np.uint8)
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    with pytest.raises(ValueError, match=f"expected 0 to {EXPERTS - 1}, {LAYERS * TOPK} a token"):
        trainer.train_step(replace(flat, routed_tokens=counts, routed_experts=routed_experts), 1)

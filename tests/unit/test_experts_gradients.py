"""Gradients of every weight of a model with experts against transformers' autograd, routers and experts included."""

import pytest
import torch
from helpers.models import disk_tensors
from helpers.plain_experts import PlainExpertsTrainer
from helpers.plain_training import Plain
from helpers.rollouts import rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from test_experts_trainer import FAMILIES, LASER, OPTIMIZER, STEPS, folders, routed
from transformers import AutoModelForCausalLM

from megatron_laser.model.mapping import global_names, rules
from megatron_laser.trainer.trainer import Trainer

__all__ = ["folders"]  # a fixture

ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight")
CASES = {
    "no losses of routers": {},
    "both losses of routers": {"aux": 0.3, "z": 0.05},
    "replay": {"replay": True, "aux": 0.3},
}


def disk_gradients(model):
    """transformers' gradients under the names of the model's folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return disk_tensors(model)


def trained_gradients(trainer):
    """Megatron's gradients under the same names."""
    chunks = trainer.policy.chunks
    parameters = global_names(chunks.models)
    found = {}
    for rule in rules(chunks.hf):
        gradient = parameters[rule.megatron].main_grad
        found |= zip(rule.hf, rule.layout.export([gradient], rule.geometry(chunks.geometry)), strict=True)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weights_gradient_is_that_of_autograd(single_process, folders, tmp_path, family, case):
    folder = folders / family
    aux, z, replay = case.get("aux", 0.0), case.get("z", 0.0), case.get("replay", False)
    optimizer = OPTIMIZER | {"grad_clip": 1e6}  # clipping would scale what is compared
    config = run_config(
        tmp_path,
        folder,
        "batching.tokens_per_micro_batch=128",
        laser=LASER | {"reasoning_warmup_steps": 0, "self_reward_warmup_steps": 0},
        optimizer=optimizer,
        moe={"aux_loss_coefficient": aux, "z_loss_coefficient": z, "routing_replay": replay},
    )
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PlainExpertsTrainer(
        model,
        Plain(**optimizer, temperature=1.0, old_logprobs="recompute", **LASER),
        aux_coefficient=aux,
        z_coefficient=z,
        replay=replay,
    )
    flat = rollout_batch(STEPS[0], seed=1)
    flat = routed(flat, 1) if replay else flat
    trainer.train_step(flat, 1)
    plain.step(flat, with_loss=True, with_mixing=True)
    found, expected = trained_gradients(trainer), disk_gradients(model)
    assert found.keys() == expected.keys()
    reached = 0
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        worst = float((found[name] - gradient).abs().max())
        assert worst <= 1e-4 * scale + 1e-8, (name, worst, scale)
        reached += scale > 0 and (".experts." in name or name.endswith(ROUTERS))
    assert reached > 40  # of 2 layers x (8 experts x 3 matrices + a router)

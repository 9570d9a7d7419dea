"""The YAMLs for real models: they load, hold the paper's settings, and their layouts fit the models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_laser.config import RunConfig, load_config, resolve_plan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
}
QWEN_32B = QWEN_7B | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
}
LLAMA_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
# name: (config.json, processes, score token, c_ref, reasoning warm-up)
MODELS = {
    "qwen2.5-7b": (QWEN_7B, 8, "<|vision_start|>", -23.0, 200),
    "orz-7b": (QWEN_7B, 8, "<|vision_start|>", -23.0, 0),
    "octothinker-3b": (LLAMA_3B, 8, 128002, -25.0, 200),
    "qwen2.5-32b": (QWEN_32B, 64, "<|vision_start|>", -23.0, 200),
}


def load(name: str, folder: Path) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(MODELS[name][0]))
    return load_config(EXAMPLES / f"{name}.yaml", [f"model.path={folder}"])


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_fits_the_model_and_leaves_room_on_an_80_gb_gpu(name: str, tmp_path: Path) -> None:
    plan = resolve_plan(load(name, tmp_path), MODELS[name][1])
    assert plan.layout.world_size == MODELS[name][1]
    # Weights, gradients and optimizer; the rest is for activations and the head.
    assert plan.bytes_per_rank.total < 40 * 2**30


@pytest.mark.parametrize("name", MODELS)
def test_the_settings_are_the_papers(name: str, tmp_path: Path) -> None:
    config = load(name, tmp_path)
    _, _, token, ref_logprob, warmup = MODELS[name]
    laser, policy, rollout = config.laser, config.policy, config.rollout
    assert (laser.score_token, laser.ref_logprob, laser.beta) == (token, ref_logprob, 0.1)
    assert (laser.alpha, laser.tau, laser.std_threshold) == (0.1, 0.1, 0.1)
    assert (laser.reasoning_warmup_steps, laser.self_reward_warmup_steps) == (warmup, 200)
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, policy.minibatches) == (128, 8, 1)
    assert (rollout.max_new_tokens, rollout.temperature, rollout.top_p) == (8192, 1.0, 1.0)
    assert (policy.kl_coefficient, policy.entropy_coefficient) == (0.0, 0.0)
    assert (policy.clip_low, policy.clip_high, policy.loss_aggregation) == (0.2, 0.2, "token_mean")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip) == (1e-6, 0.01, 1.0)
    assert (optimizer.schedule, config.data.max_prompt_tokens) == ("constant", 2048)


def test_every_yaml_for_a_real_model_is_tested_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(MODELS)

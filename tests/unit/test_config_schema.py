"""The schema: keys, defaults, descriptions and the types that YAML gets wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_laser.config import RunConfig, key_paths

REQUIRED = {
    "model": {"path": "m"},
    "data": {"train": "t.jsonl"},
    "run": {"steps": 10, "output_dir": "runs/first"},
}

DEFAULTS = {
    "model": {
        "dtype": "bfloat16",
        "vocab_multiple": 128,
        "recompute": "none",
        "recompute_layers": None,
        "offload_activations": False,
        "fp8": "none",
        "layers": "auto",
        "attention": "auto",
        "keep_logits_gib": None,
    },
    "data": {
        "validation": None,
        "test": None,
        "prompt_key": "problem",
        "answer_key": "answer",
        "prompt_suffix": " Please reason step by step, and put your final answer within \\boxed{}.",
        "apply_chat_template": True,
        "chat_template_arguments": {},
        "system_prompt": None,
        "max_prompt_tokens": 2048,
        "shuffle": True,
    },
    "rollout": {
        "engine": "in_process",
        "limit": None,
        "prompts_per_step": 128,
        "samples_per_prompt": 8,
        "drop_uniform_groups": False,
        "oversampling_cap": 3.0,
        "max_new_tokens": 8192,
        "function": None,
        "function_options": {},
        "function_deadline": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "min_p": 0.0,
        "stop_token_ids": None,
        "deadline": 3600.0,
        "max_batch_size": 256,
        "oversample": 1.0,
        "ahead": 0,
        "max_staleness": 2,
        "max_concurrency_per_server": 256,
        "min_servers": 1,
        "servers_deadline": 900.0,
        "weight_sync": "distributed",
        "sync_folder": None,
        "sync_bucket_mib": 512,
        "sync_flatten": True,
        "sync_deadline": 600.0,
        "sync_address": None,
        "verify_sync": False,
        "sglang": {
            "urls": None,
            "endpoints": None,
            "router_url": None,
            "python": None,
            "servers": 1,
            "tensor": 1,
            "device": "cuda",
            "host": "127.0.0.1",
            "port": 30000,
            "router": False,
            "api_key_env": "MEGATRON_LASER_API_KEY",
            "deterministic": False,
            "quantization": None,
            "options": {},
            "start_deadline": 1800.0,
            "hang_deadline": 300.0,
        },
    },
    "reward": {
        "function": "math_verify",
        "terms": {},
        "label": "reward",
        "threshold": None,
        "workers": 2,
        "deadline": 5.0,
        "memory_limit_gib": 4.0,
        "max_processes": None,
    },
    "laser": {
        "enabled": True,
        "score_token": None,
        "score_source": "trainer",
        "ref_logprob": None,
        "beta": 0.1,
        "alpha": 0.1,
        "tau": 0.1,
        "std_threshold": 0.1,
        "reasoning_warmup_steps": 200,
        "self_reward_warmup_steps": 200,
        "unscored": "zero",
        "max_unscored_steps": 10,
        "class_weights": True,
        "targets": [1.0, 0.0],
        "loss": "mse",
        "reference": "constant",
        "readouts": None,
        "drift_every": 0,
        "drift_samples": 128,
        "allow_partition_excess": False,
    },
    "policy": {
        "advantage": "grpo",
        "advantage_options": {},
        "loss": "ppo",
        "loss_options": {},
        "normalize_std": True,
        "old_logprobs": "recompute",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "importance_cap": None,
        "importance_mask": None,
        "importance_level": "token",
        "overlong_buffer": None,
        "overlong_penalty": 1.0,
        "length_penalty": 0.0,
        "mismatch_abort": None,
        "kl_coefficient": 0.0,
        "kl_estimator": "k3",
        "entropy_coefficient": 0.0,
        "loss_aggregation": "token_mean",
        "minibatches": 1,
        "epochs": 1,
    },
    "moe": {
        "aux_loss_coefficient": 0.0,
        "z_loss_coefficient": 0.0,
        "freeze_router": False,
        "routing_replay": False,
    },
    "optimizer": {
        "lr": 1e-6,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "grad_clip": 1.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "min_lr": 0.0,
        "distributed": False,
        "offload": False,
        "moments_dtype": "float32",
        "gradient_dtype": "float32",
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "gradient_accumulation_fusion": "auto",
    },
    "parallel": {
        "tensor": 1,
        "pipeline": 1,
        "virtual_pipeline": 1,
        "stage_layers": "even",
        "context": 1,
        "expert": 1,
        "expert_tensor": 1,
        "sequence": False,
    },
    "batching": {
        "tokens_per_micro_batch": 16384,
        "pad_multiple": None,
        "balance": "tokens",
        "share_prompts": None,
    },
    "checkpoint": {
        "every": 100,
        "keep_last": 2,
        "keep_every": 0,
        "asynchronous": False,
        "verify": True,
        "deadline": 3600.0,
        "folder": None,
        "export_hf": True,
        "export_every": 0,
        "export_keep": None,
        "best": {"metric": None, "mode": "max"},
    },
    "evaluation": {
        "every": 0,
        "baseline": True,
        "samples_per_prompt": 1,
        "max_prompts": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": None,
        "final_samples_per_prompt": 8,
        "seed": 1234,
    },
    "logging": {
        "tensorboard": True,
        "wandb": False,
        "all_metrics": False,
        "wandb_project": None,
        "live": "auto",
        "rollouts_every": 0,
        "record_batches_every": 0,
        "rollouts_tokens": False,
        "timeline_every": 10,
        "straggler_every": 50,
        "machine": None,
        "level": "INFO",
        "profile": {"steps": None, "ranks": [0], "memory": False, "asked_steps": 1},
    },
    "alarms": {
        "enabled": True,
        "window": 20,
        "needed": 14,
        "early_steps": 20,
        "score_patience": 100,
        "score_collapse": 0.55,
        "score_flat": 0.02,
        "score_shift": 0.4,
        "entropy_collapse": 0.1,
        "length_growth": 4.0,
        "length_shrink": 0.4,
        "truncated": 0.5,
        "unscored": 0.5,
        "no_end": 10,
        "unreadable": 0.25,
        "hacking_format": 0.15,
        "hacking_score": 0.2,
        "hacking_validation": 0.1,
        "accuracy_fall": 0.15,
        "mismatch": 0.05,
        "mismatch_kl": 0.01,
        "mismatch_growth": 5.0,
        "c_ref_drift": 2.0,
        "uniform_groups": 0.95,
        "gradient_explosion": 10.0,
        "skipped_steps": 1,
        "failed_gradings": 0.05,
        "failed_functions": 0.1,
        "server_deaths": 1,
        "servers_idle": 0.8,
        "trainer_idle": 0.8,
        "straggler": 1.5,
    },
    "run": {
        "name": "first",
        "mode": "train",
        "batches": None,
        "fake": {
            "weights": False,
            "responses": False,
            "prompt_tokens": None,
            "response_tokens": None,
            "spread": 0.7,
        },
        "seed": 1,
        "resume": "auto",
        "deadline": 900.0,
        "start_grace": 120.0,
        "time_limit": None,
        "max_bad_steps": 3,
        "epochs": None,
        "early_stop": {"metric": None, "mode": "max", "patience": 3, "min_delta": 0.0},
    },
}


def build(section: str, **values: object) -> RunConfig:
    data = {name: dict(content) for name, content in REQUIRED.items()}
    data.setdefault(section, {}).update(values)
    return RunConfig.model_validate(data)


def test_importing_the_configuration_imports_neither_torch_nor_megatron_core_nor_transformers():
    code = (
        "import sys, megatron_laser.config, megatron_laser.config.plan.view; "
        "heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_defaults_are_the_papers_recipe():
    dumped = RunConfig.model_validate(REQUIRED).model_dump(mode="json")
    for section, content in REQUIRED.items():
        for key in content:
            del dumped[section][key]
    assert dumped == DEFAULTS, "a new or changed default is written into DEFAULTS of this file, too"


def test_every_key_has_a_description():
    for section, keys in key_paths().items():
        model = RunConfig.model_fields[section].annotation
        assert model.__doc__, section
        for key in keys:
            *outer, name = key.split(".")
            holder = model
            for part in outer:
                holder = holder.model_fields[part].annotation
            assert holder.model_fields[name].description, f"{section}.{key}"


def test_a_configuration_cannot_be_changed():
    config = RunConfig.model_validate(REQUIRED)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 3


def test_a_number_that_yaml_reads_as_a_string_is_a_number():
    config = build("optimizer", lr="1e-6", betas=["9e-1", 0.95])
    assert config.optimizer.lr == 1e-6
    assert config.optimizer.betas == (0.9, 0.95)


def test_on_and_off_that_yaml_reads_as_booleans_are_switch_values():
    assert build("logging", live=True).logging.live == "on"
    assert build("logging", live=False).logging.live == "off"


def test_null_is_a_value_of_every_key_whose_default_is_null():
    for section, content in DEFAULTS.items():
        for key in [key for key, value in content.items() if value is None]:
            assert getattr(getattr(build(section, **{key: None}), section), key) is None


def test_a_single_path_is_a_list_of_one():
    assert build("data", train="a.jsonl").data.train == (Path("a.jsonl"),)
    assert build("data", test=["a.jsonl", "b.parquet"]).data.test == (Path("a.jsonl"), Path("b.parquet"))


def test_a_single_stop_token_id_is_a_list_of_one():
    assert build("rollout", stop_token_ids=7).rollout.stop_token_ids == (7,)


def test_the_name_of_a_run_is_its_folders_unless_given():
    assert build("run", name=None).run.name == "first"
    assert build("run", name="second").run.name == "second"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("laser", "beta", "abc"),
        ("laser", "beta", True),
        ("laser", "beta", 0.0),
        ("laser", "beta", float("nan")),
        ("laser", "alpha", "inf"),
        ("laser", "tau", 1.5),
        ("laser", "ref_logprob", 0.0),
        ("laser", "ref_logprob", 23.0),
        ("laser", "score_token", True),
        ("laser", "score_token", -1),
        ("laser", "score_token", ""),
        ("laser", "enabled", "yes"),
        ("laser", "enabled", 1),
        ("laser", "targets", [1.0]),
        ("laser", "unscored", "one"),
        ("rollout", "top_p", 0.0),
        ("rollout", "top_p", 1.01),
        ("rollout", "top_k", 0),
        ("rollout", "min_p", 1.0),
        ("rollout", "temperature", 0.0),
        ("rollout", "samples_per_prompt", "8"),
        ("rollout", "samples_per_prompt", 8.0),
        ("rollout", "samples_per_prompt", True),
        ("rollout", "stop_token_ids", []),
        ("rollout", "stop_token_ids", [-1]),
        ("rollout", "engine", "vllm"),
        ("policy", "dual_clip", 1.0),
        ("policy", "clip_low", 1.0),
        ("policy", "importance_cap", 0.0),
        ("policy", "kl_coefficient", -0.1),
        ("optimizer", "betas", [0.9, 1.0]),
        ("optimizer", "lr", None),
        ("parallel", "tensor", 0),
        ("reward", "function", "rewards.py:"),
        ("reward", "deadline", 0),
        ("data", "train", []),
        ("data", "train", ""),
        ("data", "train", [1]),
        ("data", "prompt_key", 3),
        ("model", "dtype", "float16"),
        ("run", "steps", 0),
        ("run", "steps", 1.5),
        ("run", "output_dir", 5),
    ],
)
def test_values_outside_a_keys_type_or_range_are_refused(section, key, value):
    with pytest.raises(ValidationError) as error:
        build(section, **{key: value})
    assert error.value.errors()[0]["loc"][:2] == (section, key)

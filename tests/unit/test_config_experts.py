"""Models with experts in the configuration: their config.json, their layouts, their memory."""

import json
from dataclasses import replace

import pytest
from helpers.runs import run_config

from megatron_laser.config import (
    ConfigError,
    Layout,
    MixtureOfExperts,
    count_parameters,
    resolve_plan,
    stage_parameters,
)
from megatron_laser.config.checks.layout import check_layout
from megatron_laser.config.model_folder.architecture import architecture_from_dict
from megatron_laser.config.model_folder.parameters import (
    expert_names,
    rank_bytes,
    stage_expert_parameters,
    tensor_shapes,
)
from megatron_laser.config.plan.activations import layer_activation_bytes

# Qwen3-30B-A3B's config.json, what matters of it.
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def test_published_models_are_read_and_counted():
    qwen, mixtral = architecture_from_dict(QWEN3_30B), architecture_from_dict(MIXTRAL_8X7B)
    assert qwen.moe == MixtureOfExperts(128, 8, 768, normalised=True) and qwen.qk_norm
    assert mixtral.moe == MixtureOfExperts(8, 2, 14336, normalised=True) and not mixtral.qk_norm
    assert (mixtral.head_dim, mixtral.rope_theta, mixtral.rms_norm_eps) == (128, 1e6, 1e-5)
    assert count_parameters(qwen) == 30_532_122_624  # what transformers counts for the published folders
    assert count_parameters(mixtral) == 46_702_792_704


def test_what_a_file_leaves_out_is_what_transformers_takes():
    short = {
        name: value for name, value in MIXTRAL_8X7B.items() if name not in ("rms_norm_eps", "rope_theta")
    }
    architecture = architecture_from_dict(short)
    assert (architecture.rms_norm_eps, architecture.rope_theta) == (1e-5, 1e6)
    assert not architecture_from_dict({**QWEN3_30B, "norm_topk_prob": False}).moe.normalised
    renamed = {
        name: value for name, value in QWEN3_30B.items() if name not in ("num_experts", "norm_topk_prob")
    }
    moe = architecture_from_dict(renamed | {"num_local_experts": 64}).moe  # as transformers 5 writes it
    assert (moe.num_experts, moe.normalised) == (64, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": None}, "num_experts: expected a positive integer, got None"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok 200 is more than num_experts 128"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: expected a positive integer, got 0"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok 1 with normalised probabilities"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob: expected true or false, got 'yes'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step: 2 with mlp_only_layers"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers: [0] is not supported, expected experts in every layer"),
        ({"n_group": 8}, "n_group: 8 is a router that is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is a router that is not supported"),
        ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size: 512 is a router"),
    ],
)
def test_other_routers_and_broken_numbers_are_refused(changes, said):
    with pytest.raises(ConfigError) as error:
        architecture_from_dict(QWEN3_30B | changes)
    assert said in str(error.value)


def test_a_mixtral_that_looks_back_only_so_far_is_refused():
    with pytest.raises(ConfigError, match="sliding_window: 4096 is not supported"):
        architecture_from_dict(MIXTRAL_8X7B | {"sliding_window": 4096})


def test_a_rank_has_its_share_of_experts_and_of_everything_else():
    architecture = architecture_from_dict(QWEN3_30B)
    whole = stage_parameters(architecture, Layout(), 1)
    assert whole == (count_parameters(architecture),)
    experts = 48 * 128 * 3 * 768 * 2048
    assert stage_expert_parameters(architecture, Layout()) == (experts,)
    layout = Layout(tensor=4, pipeline=2, data=4, expert=8)
    assert layout.expert_data == 2
    assert stage_expert_parameters(architecture, layout) == (experts // 2 // 8,) * 2
    assert (
        stage_expert_parameters(architecture, replace(layout, expert_tensor=2)) == (experts // 2 // 16,) * 2
    )
    dense = count_parameters(architecture) - experts
    # Routers and norms are on every rank of the tensor dimension.
    replicated = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    first, last = stage_parameters(architecture, layout, 1)
    assert first + last == (dense - replicated) // 4 + replicated + experts // 8
    assert sum(size for name, size in sizes(architecture).items() if ".experts." in name) == experts


def sizes(architecture):
    found = {}
    for name, shape in tensor_shapes(architecture).items():
        found[name] = 1
        for side in shape:
            found[name] *= side
    return found


def test_the_optimizers_shards_of_experts_are_over_the_ranks_that_hold_them():
    plain = rank_bytes(1000, "bfloat16", shards=8, reference_model=False)
    assert plain.optimizer == 1500
    mixed = rank_bytes(
        1000, "bfloat16", shards=8, reference_model=False, expert_parameters=600, expert_shards=2
    )
    assert mixed.optimizer == 400 * 12 // 8 + 600 * 12 // 2
    assert (mixed.weights, mixed.gradients) == (2000, 4000)


def test_a_layer_of_experts_keeps_what_its_tokens_make():
    architecture = architecture_from_dict(QWEN3_30B)

    def kept(**changes):
        settings = dict(tokens=16384, itemsize=2, tensor=1, sequence=False, recompute="none") | changes
        return layer_activation_bytes(architecture, **settings)

    attention = 4 * 2048 + 3 * (32 * 128 + 4 * 128)
    inside = 8 * (2048 + 3 * 768)
    assert kept() == (2 * 16384 * (attention + inside), 0)
    assert kept(recompute="mlp") == (2 * 16384 * attention, 2 * 16384 * inside)
    assert kept(recompute="full")[0] == 2 * 16384 * 2048
    assert kept(expert_tensor=2)[0] - kept()[0] == 2 * 16384 * 8 * 2048
    assert kept(tensor=4, sequence=True)[0] == kept()[0] // 4


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_30B))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 151645}))
    return folder


def config_of(tmp_path, folder, *overrides, **sections):
    base = ["rollout.prompts_per_step=64", "laser.score_token=151652", "model.dtype=bfloat16"]
    return run_config(tmp_path, folder, *base, *overrides, **sections)


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (
            ["parallel.expert=3"],
            3,
            "the number of experts 128 is not divisible by parallel.expert 3: 128 % 3 = 2",
        ),
        (
            ["parallel.expert=8"],
            4,
            "a pipeline stage's ranks 4 is not divisible by parallel.expert 8 x expert_tensor 1 = 8: 4 % 8 = 4",
        ),
        (
            ["parallel.expert=4", "parallel.expert_tensor=4"],
            8,
            "not divisible by parallel.expert 4 x expert_tensor 4 = 16: 8 % 16 = 8",
        ),
        (["parallel.expert_tensor=5"], 5, "an expert's intermediate size 768 is not divisible by"),
        (
            ["moe.freeze_router=true", "moe.z_loss_coefficient=0.001"],
            2,
            "moe.z_loss_coefficient: 0.001 with moe.freeze_router would change everything but the routers",
        ),
        (["parallel.tensor=2"], 2, "parallel.tensor: 2 with experts needs parallel.sequence: true"),
    ],
)
def test_what_experts_cannot_have_is_refused_with_the_arithmetic(tmp_path, folder, overrides, ranks, said):
    config = config_of(tmp_path, folder, *overrides)
    with pytest.raises(ConfigError) as error:
        check_layout(config, architecture_from_dict(QWEN3_30B), ranks)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.expert=2", "parallel.expert: 2, but a qwen2 model has no experts"),
        ("parallel.expert_tensor=2", "parallel.expert_tensor: 2, but"),
        ("moe.routing_replay=true", "moe.routing_replay: True, but"),
        ("moe.aux_loss_coefficient=0.1", "moe.aux_loss_coefficient: 0.1, but"),
        ("moe.freeze_router=true", "moe.freeze_router: True, but"),
    ],
)
def test_a_dense_model_cannot_be_asked_for_experts(tmp_path, folder, override, said):
    dense = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 250,
        "tie_word_embeddings": False,
    }
    with pytest.raises(ConfigError) as error:
        check_layout(config_of(tmp_path, folder, override), architecture_from_dict(dense), 2)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("enable_hierarchical_cache", True, "other tokens' experts"),
        ("enable-lmcache", True, "other tokens' experts"),
        ("moe-runner-backend", "flashinfer_trtllm", "does not note which experts"),
        ("moe_runner_backend", "triton_kernel", "does not note which experts"),
        ("chunked-prefill-size", -1, "fewer tokens' experts than it feeds"),
        ("chunked_prefill_size", 4096, None),
        ("moe_runner_backend", "triton", None),
        ("enable_hierarchical_cache", False, None),
    ],
)
def test_options_with_which_servers_report_wrong_experts_are_refused_with_replay(
    tmp_path, folder, name, value, said
):
    rollout = {"engine": "sglang", "sglang": {"options": {name: value}}}
    config_of(tmp_path, folder, rollout=rollout)
    if said is None:
        config_of(tmp_path, folder, "moe.routing_replay=true", rollout=rollout)
        return
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, folder, "moe.routing_replay=true", rollout=rollout)
    assert f"rollout.sglang.options.{name}: " in str(error.value) and said in str(error.value)


def test_the_dry_run_of_a_30b_model_on_64_gpus(tmp_path, folder):
    config = config_of(
        tmp_path,
        folder,
        *("parallel.tensor=4", "parallel.sequence=true", "parallel.expert=8", "parallel.pipeline=2"),
        *("optimizer.distributed=true", "model.recompute=full", "rollout.engine=sglang", "run.deadline=900"),
    )
    plan = resolve_plan(config, 64)
    assert (plan.layout.data, plan.layout.expert, plan.layout.expert_data) == (8, 8, 4)
    experts = 24 * 128 * 3 * 768 * 2048 // 8
    assert plan.stage_parameters[0] > experts
    optimizer = next(line for line in plan.memory.lines if line.name == "optimizer")
    assert optimizer.detail == "sharded over 8, experts' over 4"
    dense = max(plan.stage_parameters) - experts
    assert optimizer.bytes == -(-12 * dense // 8) + 12 * experts // 4
    plan.memory.check(79.1 * 2**30)


def test_without_a_number_of_ranks_the_fewest_that_the_layout_fits_are_taken(tmp_path, folder):
    for overrides, ranks in (
        (["parallel.expert=4"], 4),
        (["parallel.expert=8", "parallel.context=2", "parallel.pipeline=2"], 16),
        (["parallel.expert=2", "parallel.tensor=4", "parallel.sequence=true"], 4),
        (["parallel.expert=4", "parallel.expert_tensor=2", "parallel.context=3"], 24),
    ):
        assert resolve_plan(config_of(tmp_path, folder, *overrides)).layout.world_size == ranks


def test_replayed_experts_are_in_the_memory_sum(tmp_path, folder):
    layout = ["parallel.pipeline=2", "parallel.expert=2"]

    def lines(*overrides):
        plan = resolve_plan(config_of(tmp_path, folder, *layout, *overrides), 4)
        return {line.name: line for line in plan.memory.lines}

    assert "routing replay" not in lines()
    line = lines("moe.routing_replay=true")["routing replay"]
    tokens = lines()["the step's micro-batches"].bytes // 56
    assert line.bytes == 24 * 8 * tokens
    assert "192 bytes" in line.detail


def test_the_dry_run_says_what_routers_do(tmp_path, folder):
    off = {feature.name for feature in resolve_plan(config_of(tmp_path, folder), 1).features}
    assert not off & {"routing replay", "load-balancing loss", "router z-loss", "frozen routers"}
    settings = ["moe.routing_replay=true", "moe.aux_loss_coefficient=0.01", "policy.old_logprobs=on_policy"]
    plan = resolve_plan(config_of(tmp_path, folder, *settings, laser={"enabled": False}), 1)
    said = {feature.name: feature.detail for feature in plan.features}
    assert said["load-balancing loss"] == "coefficient 0.01, over whole steps"
    assert said["routing replay"] == "tokens go to the experts that the rollout engine chose"
    plan = resolve_plan(config_of(tmp_path, folder, *settings[:1], "rollout.engine=sglang"), 1)
    (detail,) = [feature.detail for feature in plan.features if feature.name == "routing replay"]
    assert detail.endswith("of servers started with --enable-return-routed-experts")
    assert "moe.aux_loss_coefficient needs a no-grad pass that counts" in said["old-policy pass"]


def test_both_families_have_names_of_their_own():
    assert expert_names("mixtral").gate == "w1" and expert_names("qwen3_moe").gate == "gate_proj"

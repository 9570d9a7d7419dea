"""Cross-field checks: each refusal names the settings and shows the arithmetic."""

from __future__ import annotations

import math

import pytest

from megatron_laser.config import ConfigError, RunConfig, check_layout, check_settings
from megatron_laser.config.checks.partition_excess import log_partition_excess, smallest_beta
from megatron_laser.config.model_folder.architecture import Architecture, architecture_from_dict


def config(**sections: dict[str, object]) -> RunConfig:
    data: dict[str, dict[str, object]] = {
        "model": {"path": "m"},
        "data": {"train": "t.jsonl"},
        "laser": {"score_token": 5, "ref_logprob": -23.0},
        "run": {"steps": 10, "output_dir": "out"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return RunConfig.model_validate(data)


def architecture(**changes: object) -> Architecture:
    return architecture_from_dict(
        {
            "model_type": "qwen2",
            "hidden_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 200,
            "vocab_size": 100,
            "max_position_embeddings": 32768,
            **changes,
        }
    )


def test_the_papers_recipe_passes():
    check_settings(config())


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"laser": {"score_token": None}}, ["laser.score_token: required"]),
        (
            {
                "laser": {"drift_every": 10, "drift_samples": 33},
                "rollout": {"prompts_per_step": 4, "samples_per_prompt": 8},
            },
            ["laser.drift_samples: 33", "4 x rollout.samples_per_prompt 8 = 32; use as many or fewer"],
        ),
        (
            {"laser": {"drift_every": 10, "readouts": [{"tokens": [5, 6], "score": "pair_sigmoid"}]}},
            ["laser.drift_every: 10 with laser.readouts[0].score pair_sigmoid, which has no c_ref"],
        ),
        (
            {"model": {"attention": "flash", "layers": "torch"}},
            ["model.attention: flash with model.layers torch"],
        ),
        (
            {"model": {"attention": "fused", "dtype": "float32"}},
            ["model.attention: fused with model.dtype float32", "set model.attention to auto"],
        ),
        (
            {"batching": {"pad_multiple": 6}, "parallel": {"tensor": 4, "sequence": True}},
            [
                "batching.pad_multiple: 6 is not divisible by 4, into which parallel.tensor 4 with parallel.sequence "
                "divides packed sequences: 6 % 4 = 2"
            ],
        ),
        (
            {"batching": {"pad_multiple": 6}, "parallel": {"context": 2}},
            [
                "batching.pad_multiple: 6 is not divisible by 4, into which parallel.context 2 (two chunks a rank) "
                "divides packed sequences: 6 % 4 = 2"
            ],
        ),
        (
            {"batching": {"pad_multiple": 4}, "parallel": {"context": 2, "tensor": 4, "sequence": True}},
            ["4 is not divisible by 8", "parallel.context 2 (two chunks a rank) and parallel.tensor 4 with"],
        ),
        ({"laser": {"ref_logprob": None}}, ["laser.ref_logprob: required"]),
        ({"laser": {"targets": [0.0, 0.0]}}, ["laser.targets", "[0, 0]", "right must be greater"]),
        (
            {"laser": {"loss": "bce", "targets": [0.9, 0.0]}},
            ["laser.targets: [0.9, 0]", "laser.loss bce", "[1.0, 0.0]"],
        ),
        (
            {"policy": {"old_logprobs": "on_policy", "minibatches": 2, "epochs": 3}},
            ["policy.old_logprobs: on_policy", "minibatches 2 x policy.epochs 3 = 6"],
        ),
        (
            {"policy": {"old_logprobs": "rollout", "importance_cap": 2.0}},
            ["policy.importance_cap: 2", "policy.old_logprobs rollout"],
        ),
        *(
            (
                {"rollout": {"samples_per_prompt": 1}, "policy": {"advantage": advantage}},
                [
                    "rollout.samples_per_prompt: 1",
                    f"policy.advantage {advantage}",
                    "2 or more",
                    "reinforce_pp",
                ],
            )
            for advantage in ("grpo", "dr_grpo", "rloo")
        ),
        (
            {
                "rollout": {"samples_per_prompt": 1, "drop_uniform_groups": True},
                "policy": {"advantage": "reinforce_pp"},
            },
            ["rollout.drop_uniform_groups: true", "rollout.samples_per_prompt 1"],
        ),
        (
            {"policy": {"advantage": "reinforce_pp", "normalize_std": False}},
            ["policy.normalize_std: false", "reinforce_pp"],
        ),
        (
            {"policy": {"advantage": "mine.py:centred", "normalize_std": False}},
            ["policy.normalize_std: false", "mine.py:centred, a function", "policy.advantage_options"],
        ),
        (
            {
                "rollout": {"samples_per_prompt": 1, "drop_uniform_groups": True},
                "policy": {"advantage": "mine.py:centred"},
            },
            ["rollout.drop_uniform_groups: true", "rollout.samples_per_prompt 1"],
        ),
        *(
            ({"policy": {"importance_mask": mask}}, ["policy.importance_mask", "0 <= low < 1 < high"])
            for mask in ([1.2, 2.0], [0.5, 0.9], [-0.5, 2.0])
        ),
        (
            {"policy": {"old_logprobs": "rollout", "importance_mask": [0.5, 2.0]}},
            ["policy.importance_mask: [0.5, 2]", "policy.old_logprobs rollout"],
        ),
        (
            {"rollout": {"prompts_per_step": 10}, "policy": {"minibatches": 4}},
            ["rollout.prompts_per_step 10", "policy.minibatches 4: 10 % 4 = 2"],
        ),
        ({"evaluation": {"every": 5}}, ["evaluation.every: 5", "data.validation"]),
        (
            {"optimizer": {"overlap_param_gather": True}},
            ["optimizer.distributed: true and optimizer.overlap_grad_reduce: true"],
        ),
        (
            {"optimizer": {"overlap_param_gather": True, "distributed": True}},
            ["overlap_param_gather: true needs optimizer.overlap_grad_reduce: true"],
        ),
        ({"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}, ["optimizer.min_lr: 1e-05", "optimizer.lr 1e-06"]),
        (
            {"optimizer": {"schedule": "cosine", "warmup_steps": 20}, "policy": {"minibatches": 2}},
            ["optimizer.warmup_steps: 20", "10 x policy.epochs 1 x policy.minibatches 2 = 20"],
        ),
        ({"parallel": {"sequence": True}}, ["parallel.sequence", "parallel.tensor above 1, got 1"]),
        (
            {"parallel": {"virtual_pipeline": 2}},
            ["parallel.virtual_pipeline: 2", "parallel.pipeline above 1, got 1"],
        ),
        (
            {"batching": {"tokens_per_micro_batch": 10239}},
            [
                "tokens_per_micro_batch: 10239 is less than",
                *("2048", "8192 = 10240", "use 10240 or more, or parallel.context 2 (10239 x 2 = 20478)"),
            ],
        ),
        (
            {"batching": {"tokens_per_micro_batch": 5119}, "parallel": {"context": 2}},
            [
                "tokens_per_micro_batch: 5119 x parallel.context 2 = 10238 is less than the longest sequence",
                *("8192 = 10240", "use 5120 or more, or parallel.context 3 (5119 x 3 = 15357)"),
            ],
        ),
    ],
)
def test_impossible_combinations_are_refused(sections, parts):
    with pytest.raises(ConfigError) as error:
        check_settings(config(**sections))
    assert len(error.value.problems) == 1
    for part in parts:
        assert part in error.value.problems[0]


@pytest.mark.parametrize(
    "sections",
    [
        {"laser": {"enabled": False, "score_token": None, "ref_logprob": None}},
        {"laser": {"ref_logprob": None, "reference": "model"}},
        {"laser": {"score_source": "server"}, "policy": {"epochs": 2}},
        {"laser": {"score_source": "server"}, "policy": {"old_logprobs": "rollout"}},
        {"laser": {"loss": "bce"}},
        {"rollout": {"samples_per_prompt": 1}, "policy": {"advantage": "reinforce_pp"}},
        {"rollout": {"samples_per_prompt": 1}, "policy": {"advantage": "mine.py:centred"}},
        {"policy": {"importance_mask": [0.5, 2.0], "importance_cap": 1.5, "mismatch_abort": 0.1}},
        {"rollout": {"drop_uniform_groups": True, "oversampling_cap": 1}},
        {"policy": {"old_logprobs": "on_policy", "importance_cap": 2.0}},
        {"policy": {"old_logprobs": "rollout", "minibatches": 4}},
        {"optimizer": {"schedule": "constant", "warmup_steps": 100}},
        {"parallel": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}},
        {"batching": {"tokens_per_micro_batch": 10240}},
        {"batching": {"tokens_per_micro_batch": 5120}, "parallel": {"context": 2}},
        {"batching": {"pad_multiple": 8}, "parallel": {"context": 2, "tensor": 4, "sequence": True}},
    ],
)
def test_combinations_that_run_are_accepted(sections):
    check_settings(config(**sections))


def test_a_score_that_would_disturb_the_policy_is_refused_with_the_smallest_beta():
    with pytest.raises(ConfigError) as error:
        check_settings(config(laser={"ref_logprob": -11.0}))
    (problem,) = error.value.problems
    # e^-11 * (e^10 - 1) = 0.367863
    assert "laser.beta 0.1 with laser.ref_logprob -11" in problem
    assert "e^-11 * (e^10 - 1) = 0.368, more than 0.05" in problem
    # 1 / log(1 + 0.05 e^11) = 0.12491
    assert "laser.beta to 0.125 or more" in problem
    assert "laser.allow_partition_excess: true" in problem
    check_settings(config(laser={"ref_logprob": -11.0, "beta": 0.125}))
    check_settings(config(laser={"ref_logprob": -11.0, "allow_partition_excess": True}))


def test_the_partition_check_counts_the_target_of_right_responses():
    with pytest.raises(ConfigError, match=r"e\^\(2/beta\)"):
        check_settings(config(laser={"ref_logprob": -18.0, "targets": [2.0, 0.0]}))
    check_settings(config(laser={"ref_logprob": -18.0}))


def test_the_partition_check_does_not_overflow():
    with pytest.raises(ConfigError, match=r"= e\^9977\.0, more than"):
        check_settings(config(laser={"beta": 1e-4}))


def test_the_partition_excess_is_the_closed_form():
    for ref_logprob, beta in ((-23.0, 0.1), (-11.0, 0.1), (-5.0, 2.0), (-0.5, 10.0)):
        expected = math.exp(ref_logprob) * (math.exp(1 / beta) - 1)
        assert math.exp(log_partition_excess(ref_logprob, beta)) == pytest.approx(expected, rel=1e-12)
    assert math.exp(log_partition_excess(-23.0, 0.1)) == pytest.approx(2.3e-6, rel=0.02)


def test_the_smallest_beta_is_where_the_excess_meets_the_limit():
    for ref_logprob in (-30.0, -11.0, -1.0):
        beta = smallest_beta(ref_logprob)
        assert math.exp(log_partition_excess(ref_logprob, beta)) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize(
    ("parallel", "world", "parts"),
    [
        ({"tensor": 4}, 4, ["num_key_value_heads 2 is not divisible by parallel.tensor 4: 2 % 4 = 2"]),
        ({"tensor": 5}, 5, ["num_attention_heads 12 is not divisible by parallel.tensor 5: 12 % 5 = 2"]),
        ({"tensor": 5}, 5, ["hidden_size 96 is not divisible by parallel.tensor 5: 96 % 5 = 1"]),
        ({"tensor": 3}, 3, ["intermediate_size 200 is not divisible by parallel.tensor 3: 200 % 3 = 2"]),
        ({"pipeline": 4}, 4, ["num_hidden_layers 6 is not divisible by parallel.pipeline 4: 6 % 4 = 2"]),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            2,
            ["num_hidden_layers 6", "pipeline 2 x virtual_pipeline 2 = 4: 6 % 4 = 2"],
        ),
        (
            {"tensor": 2, "pipeline": 2},
            6,
            ["world size 6", "parallel.tensor 2 x pipeline 2 x context 1 = 4: 6 % 4 = 2"],
        ),
        (
            {"tensor": 2, "context": 2},
            6,
            ["world size 6", "parallel.tensor 2 x pipeline 1 x context 2 = 4: 6 % 4 = 2"],
        ),
        ({"tensor": 2}, 0, ["world size 0: expected 1 or more"]),
        (
            {},
            2048,
            ["128 x rollout.samples_per_prompt 8 / policy.minibatches 1 = 1024", "size 2048 / 1 = 2048"],
        ),
        ({"context": 2}, 4096, ["fewer than the data-parallel size 4096 / 2 = 2048: some ranks would never"]),
    ],
)
def test_impossible_layouts_are_refused_with_the_arithmetic(parallel, world, parts):
    with pytest.raises(ConfigError) as error:
        check_layout(config(parallel=parallel), architecture(), world)
    for part in parts:
        assert any(part in problem for problem in error.value.problems), error.value.problems


def test_sequences_longer_than_the_models_positions_are_refused():
    short = architecture(max_position_embeddings=4096)
    with pytest.raises(ConfigError) as error:
        check_layout(config(), short, 1)
    (problem,) = error.value.problems
    assert "2048 + rollout.max_new_tokens 8192 = 10240" in problem
    assert "max_position_embeddings 4096" in problem
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens 4096 = 6144"):
        check_layout(config(rollout={"max_new_tokens": 1024}, evaluation={"max_new_tokens": 4096}), short, 1)


def test_the_padding_of_context_parallelism_needs_no_positions_of_the_model():
    longest = config(rollout={"max_new_tokens": 8193}, parallel={"context": 8})  # 10241, padded to 10256
    check_layout(longest, architecture(max_position_embeddings=10241), 8)
    with pytest.raises(ConfigError, match="8193 = 10241 is more than"):
        check_layout(longest, architecture(max_position_embeddings=10240), 8)


def test_possible_layouts_pass():
    for parallel, world in (
        ({"context": 8}, 8192),
        ({"tensor": 2, "context": 2, "pipeline": 3}, 24),
        ({}, 1),
        ({"tensor": 2}, 4),
        ({"pipeline": 3, "virtual_pipeline": 2}, 3),
        ({"tensor": 2, "pipeline": 2}, 8),
        ({}, 1024),
    ):
        check_layout(config(parallel=parallel), architecture(), world)

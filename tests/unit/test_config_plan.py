"""The dry run: what a configuration resolves to, from config.json alone, and the score token's id."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_laser.config import (
    ConfigError,
    Plan,
    RunConfig,
    evaluation_max_new_tokens,
    needs_reference_model,
    old_policy_pass_kind,
    read_stop_token_ids,
    resolve_plan,
    resolve_score_token,
)
from megatron_laser.config.plan.resolve import another_layout
from megatron_laser.config.plan.view import render_plan

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 200,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
TOKENIZER = {
    "added_tokens": [
        {"id": 1, "content": "<|eos|>", "special": True},
        {"id": 150, "content": "<|vision_start|>", "special": True},
        {"id": 151, "content": "<|vision_end|>", "special": True},
    ],
    "model": {"type": "BPE", "vocab": {"hello": 7}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return tmp_path


def add(folder: Path, name: str, contents: object) -> None:
    (folder / name).write_text(json.dumps(contents), encoding="utf-8")


def config(folder: Path, **sections: dict[str, object]) -> RunConfig:
    data: dict[str, dict[str, object]] = {
        "model": {"path": str(folder)},
        "data": {"train": "t.jsonl"},
        "laser": {"score_token": "<|vision_start|>", "ref_logprob": -23.0},
        "run": {"steps": 500, "output_dir": "out/demo"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return RunConfig.model_validate(data)


def feature(plan: Plan, name: str) -> tuple[bool, str]:
    (found,) = [item for item in plan.features if item.name == name]
    return found.on, found.detail


def text(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render_plan(plan))
    return console.file.getvalue()


def test_the_default_world_holds_one_copy_of_the_model(folder):
    parallel = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}
    plan = resolve_plan(config(folder, parallel=parallel))
    assert (plan.layout.world_size, plan.layout.data) == (4, 1)
    assert resolve_plan(config(folder, parallel=parallel), 8).layout.data == 2


def test_an_impossible_world_is_refused(folder):
    with pytest.raises(ConfigError, match="world size 3"):
        resolve_plan(config(folder, parallel={"tensor": 2}), 3)


def test_the_batch_arithmetic_adds_up(folder):
    plan = resolve_plan(
        config(
            folder,
            rollout={"prompts_per_step": 12, "samples_per_prompt": 4, "max_new_tokens": 900},
            data={"max_prompt_tokens": 100},
            policy={"minibatches": 3, "epochs": 2},
            batching={"tokens_per_micro_batch": 3500},
        ),
        3,
    )
    batch = plan.batch
    assert (batch.prompts, batch.samples_per_prompt, batch.sequences) == (12, 4, 48)
    assert (batch.optimizer_steps, batch.sequences_per_optimizer_step) == (6, 16)
    assert batch.sequences_per_rank == 6  # 16 over 3 ranks, the fullest
    assert batch.tokens_per_rank == 6000
    assert batch.micro_batches_per_rank == 2  # 3 sequences of 1000 fit 3500


def test_the_optimizer_is_sharded_only_when_distributed(folder):
    whole = resolve_plan(config(folder), 4).bytes_per_rank
    sharded = resolve_plan(config(folder, optimizer={"distributed": True}), 4).bytes_per_rank
    assert sharded.weights == whole.weights
    assert sharded.optimizer == whole.optimizer // 4


def test_the_biggest_stage_is_what_counts(folder):
    plan = resolve_plan(config(folder, parallel={"pipeline": 2}))
    assert plan.bytes_per_rank.weights == 2 * max(plan.stage_parameters)


def test_laser_starts_after_its_warm_ups(folder):
    plan = resolve_plan(config(folder))
    assert feature(plan, "self-reward loss") == (True, "from step 201 of 500, alpha 0.1")
    assert feature(plan, "self-reward advantages") == (True, "from step 401 of 500, tau 0.1")


def test_laser_that_never_starts_is_shown_as_off(folder):
    plan = resolve_plan(config(folder, run={"steps": 300}))
    assert feature(plan, "self-reward loss")[0] is True
    on, detail = feature(plan, "self-reward advantages")
    assert on is False
    assert "would start at step 401, but run.steps is 300" in detail


def test_plain_grpo_has_no_score(folder):
    plan = resolve_plan(config(folder, laser={"enabled": False}))
    assert plan.score_token is None
    assert feature(plan, "self-reward loss") == (False, "laser.enabled is false")


def test_a_reference_model_is_loaded_only_for_kl_or_the_ablation(folder):
    assert not needs_reference_model(config(folder))
    assert needs_reference_model(config(folder, policy={"kl_coefficient": 0.01}))
    assert needs_reference_model(config(folder, laser={"reference": "model"}))
    assert not needs_reference_model(config(folder, laser={"reference": "model", "enabled": False}))
    plan = resolve_plan(config(folder, policy={"kl_coefficient": 0.01}))
    assert feature(plan, "reference model") == (True, "loaded: policy.kl_coefficient is 0.01")
    assert plan.bytes_per_rank.reference_model == plan.bytes_per_rank.weights


@pytest.mark.parametrize(
    ("old_logprobs", "laser", "expected"),
    [
        ("recompute", {}, "full"),
        ("recompute", {"enabled": False}, "full"),
        ("on_policy", {}, "score_rows"),
        ("rollout", {}, "score_rows"),
        ("rollout", {"score_source": "server"}, "none"),
        ("on_policy", {"enabled": False}, "none"),
    ],
)
def test_the_old_policy_pass_runs_only_where_something_needs_it(folder, old_logprobs, laser, expected):
    run = config(folder, policy={"old_logprobs": old_logprobs}, laser=laser)
    assert old_policy_pass_kind(run) == expected
    assert feature(resolve_plan(run), "old-policy pass")[0] is (expected != "none")


def test_evaluation_uses_the_rollouts_length_unless_told(folder):
    assert evaluation_max_new_tokens(config(folder)) == 8192
    assert evaluation_max_new_tokens(config(folder, evaluation={"max_new_tokens": 10})) == 10


def test_a_missing_model_is_named(folder):
    with pytest.raises(ConfigError, match=r"model\.path: .*absent is not a folder"):
        resolve_plan(config(folder / "absent"))


def test_config_json_is_enough(folder):
    plan = resolve_plan(config(folder))
    assert plan.score_token is not None
    assert (plan.score_token.id, plan.score_token.verified) == (None, False)
    assert "unverified" in text(plan)


def test_the_rendered_plan_shows_layout_batch_memory_and_features(folder):
    add(folder, "tokenizer.json", TOKENIZER)
    shown = text(resolve_plan(config(folder, parallel={"tensor": 2, "sequence": True}), 4))
    for part in (
        "4 ranks, tensor 2 with sequence parallel, pipeline 1, virtual pipeline 1, context 1, data 2",
        "200, padded to 256",
        "<|vision_start|> (id 150), verified",
        "128 prompts x 8 samples = 1,024 sequences",
        "512 sequences per optimizer step",
        "5,242,880 tokens in 512 micro-batches of up to 16,384",
        "not loaded",
    ):
        assert part in shown, shown


def test_a_token_is_found_by_text_and_by_id(folder):
    add(folder, "tokenizer.json", TOKENIZER)
    for setting in ("<|vision_start|>", 150):
        token = resolve_score_token(folder, setting)
        assert (token.id, token.text, token.verified, token.note) == (150, "<|vision_start|>", True, "")


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("added_tokens.json", {"<|vision_start|>": 150}),
        ("vocab.json", {"<|vision_start|>": 150}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"150": {"content": "<|vision_start|>", "special": True}}},
        ),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0]] * 150 + [["<|vision_start|>", -1.0]]}}),
    ],
)
def test_each_of_the_tokenizers_files_is_enough(folder, name, contents):
    add(folder, name, contents)
    token = resolve_score_token(folder, "<|vision_start|>")
    assert (token.id, token.verified) == (150, True)


def test_an_ordinary_token_is_noted(folder):
    add(folder, "tokenizer.json", TOKENIZER)
    assert "not a special token" in resolve_score_token(folder, "hello").note


def test_an_unknown_token_is_refused_with_near_special_tokens(folder):
    add(folder, "tokenizer.json", TOKENIZER)
    with pytest.raises(ConfigError, match=r"'<\|vision_strat\|>' is not in the tokenizer") as error:
        resolve_score_token(folder, "<|vision_strat|>")
    assert "'<|vision_start|>'" in str(error.value)
    with pytest.raises(ConfigError, match=r"its special tokens are '<\|eos\|>'"):
        resolve_score_token(folder, "##########")


def test_an_id_without_a_name_is_unverified(folder):
    add(folder, "tokenizer.json", TOKENIZER)
    token = resolve_score_token(folder, 199)
    assert (token.id, token.text, token.verified) == (199, None, False)
    assert "no token has this id in tokenizer.json" in token.note


def test_an_id_outside_the_vocabulary_is_refused(folder):
    with pytest.raises(ConfigError, match="token id 200 is not in the model's vocabulary"):
        resolve_plan(config(folder, laser={"score_token": 200}))


def test_a_stop_token_cannot_be_the_score_token(folder):
    with pytest.raises(ConfigError, match=r"is id 1, which also ends a response"):
        resolve_plan(config(folder, laser={"score_token": 1}))
    with pytest.raises(ConfigError, match=r"is id 9, which also ends a response"):
        resolve_plan(config(folder, laser={"score_token": 9}, rollout={"stop_token_ids": [8, 9]}))


def test_stop_ids_come_from_the_generation_config_first(folder):
    assert read_stop_token_ids(folder) == (1,)
    add(folder, "generation_config.json", {"eos_token_id": [3, 4]})
    assert read_stop_token_ids(folder) == (3, 4)


def test_a_broken_tokenizer_file_is_named(folder):
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*\n.*cannot be read as JSON"):
        resolve_score_token(folder, "x")


def test_another_layout_of_a_run_is_what_resolving_it_anew_gives(folder):
    first = resolve_plan(config(folder, rollout={"max_new_tokens": 500}), 1, 40.0)
    other = config(
        folder,
        rollout={"max_new_tokens": 500},
        parallel={"tensor": 2, "sequence": True, "pipeline": 2, "context": 2},
        optimizer={"distributed": True, "offload": True},
        model={"path": str(folder), "recompute": "full"},
    )
    assert another_layout(first, other, 16) == resolve_plan(other, 16, 40.0)
    with pytest.raises(ConfigError, match="world size 12 is not divisible"):
        another_layout(first, other, 12)

"""What a dry run says of ranks and stages that wait for each other: against the schedule's own numbers."""

import pytest
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.batching.expected import balance_lines
from megatron_laser.config.plan.resolve import resolve_plan
from megatron_laser.config.stages import head_layers

SMALL = "batching.tokens_per_micro_batch=256"


@pytest.fixture
def plan_of(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2")

    def make(ranks, *overrides):
        config = run_config(
            tmp_path,
            tmp_path / "model",
            *overrides,
            laser={"enabled": False},
            rollout={"prompts_per_step": 16, "samples_per_prompt": 4, "max_new_tokens": 192},
        )
        return resolve_plan(config, ranks)

    return make


def share(line, before, after):
    return float(line.split(before)[1].split(after)[0].rstrip("% ")) / 100


def test_one_rank_shares_nothing(plan_of):
    assert balance_lines(plan_of(1)) == []
    assert balance_lines(plan_of(2, "parallel.tensor=2")) == []


def test_balance_by_flops_is_no_worse_and_each_choice_names_the_other(plan_of):
    (tokens,) = balance_lines(plan_of(4))
    (flops,) = balance_lines(plan_of(4, "batching.balance=flops"))
    assert "the busiest of 4 data-parallel ranks" in tokens and "1 to 192 tokens alike" in tokens
    for line, own, other in ((tokens, "tokens", "flops"), (flops, "flops", "tokens")):
        assert f"(batching.balance {own}; {other}: " in line
    assert share(flops, "ranks works ", " longer") <= share(tokens, "ranks works ", " longer")
    assert share(tokens, "flops: ", ")") == share(flops, "ranks works ", " longer")


def test_the_pipeline_s_share_of_waiting_is_of_the_micro_batches_that_will_run(plan_of):
    plan = plan_of(2, "parallel.pipeline=2", "parallel.stage_layers=[3, 1]", "policy.minibatches=2", SMALL)
    (line,) = balance_lines(plan)
    head = head_layers(plan.config, plan.architecture)
    assert f"stages of 3, 1 layers, the last one's head worth {head:.1f}" in line
    slowest = max(3.0, 1 + head) / ((4 + head) / 2) - 1
    assert f"the slowest works {slowest:.1%} longer" in line
    micro_batches = int(line.split("a step of ")[1].split(" ")[0].replace(",", ""))
    assert micro_batches > 1
    assert share(line, "a stage waits ", " of a step") == pytest.approx(1 / (micro_batches + 1), abs=0.01)


def test_a_batch_too_large_to_try_is_left_out(plan_of):
    assert balance_lines(plan_of(4, "rollout.prompts_per_step=8192")) == []

"""The dry run's sum on ranks of a CPU is what a training step allocates there."""

import pytest
from helpers.planner_memory import memory_run, planned_over_measured

pytestmark = pytest.mark.distributed

ONE = {
    "as it is": [],
    "recompute": ["model.recompute=full"],
    "recompute MLPs": ["model.recompute=[mlp]"],
    "bfloat16": ["model.dtype=bfloat16"],
    "shared prompts": ["batching.share_prompts=true"],
    "LaSeR": ["laser.enabled=true", "laser.score_token=2", "laser.ref_logprob=-20.0"],
}
TWO = {
    "tensor": ["parallel.tensor=2"],
    "tensor, sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "data": ["optimizer.distributed=true"],
}
FOUR = {
    "tensor, pipeline": ["parallel.tensor=2", "parallel.pipeline=2"],
    "tensor, data": ["parallel.tensor=2", "optimizer.distributed=true"],
    "pipeline, data": ["parallel.pipeline=2", "optimizer.distributed=true"],
}
RECOMPUTES = ("none", "full")


def check(ratios):
    assert {key: ratio for key, ratio in ratios.items() if not 0.9 <= ratio <= 1.1} == {}


def test_two_ranks_that_share_the_optimizers_state_allocate_what_is_planned(tmp_path):
    check(planned_over_measured(memory_run(tmp_path, "1M, untied"), 2, *TWO["data"]))


@pytest.mark.long
@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize("model", ["1M, untied", "7M, tied"])
def test_one_rank_allocates_what_is_planned(tmp_path, model, case):
    check(planned_over_measured(memory_run(tmp_path, model), 1, *ONE[case]))


@pytest.mark.long
@pytest.mark.parametrize("case", TWO)
@pytest.mark.parametrize("model", ["1M, untied", "7M, tied"])
def test_two_ranks_allocate_what_is_planned(tmp_path, model, case):
    file = memory_run(tmp_path, model)
    for recompute in RECOMPUTES:
        check(planned_over_measured(file, 2, *TWO[case], f"model.recompute={recompute}"))


@pytest.mark.long
@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_allocate_what_is_planned(tmp_path, case):
    file = memory_run(tmp_path, "7M, tied")
    for recompute in RECOMPUTES:
        check(planned_over_measured(file, 4, *FOUR[case], f"model.recompute={recompute}"))


@pytest.mark.long
@pytest.mark.parametrize("expert", [1, 2])
def test_experts_take_what_is_planned(tmp_path, expert):
    file = memory_run(tmp_path, "4M, experts")
    for recompute in RECOMPUTES:
        overrides = [f"parallel.expert={expert}", f"model.recompute={recompute}"]
        check(planned_over_measured(file, expert, *overrides))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes, case", [(1, []), (2, TWO["data"]), (4, FOUR["pipeline, data"])])
def test_a_model_of_135m_allocates_what_is_planned(tmp_path, processes, case):
    file = memory_run(tmp_path, "135M, tied")
    # A prompt's responses fill a micro-batch: one on each data-parallel rank.
    prompts = f"rollout.prompts_per_step={min(processes, 2)}"
    for recompute in RECOMPUTES:
        overrides = [*case, prompts, f"model.recompute={recompute}"]
        check(planned_over_measured(file, processes, *overrides, timeout=400))

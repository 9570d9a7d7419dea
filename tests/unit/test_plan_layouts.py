"""`plan`'s search: what fits is ranked by predicted time, and what is printed can be run as it was planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from megatron_laser.config import ConfigError, load_config, resolve_plan
from megatron_laser.planner.assumptions import read_assumptions
from megatron_laser.planner.configured import as_configured, base_plan
from megatron_laser.planner.layouts import Proposer, Shape, Split, server_tensors, splits
from megatron_laser.planner.machine import Machine, read_machine
from megatron_laser.planner.phase_times import predict_step
from megatron_laser.planner.ranking import TIE, NothingFits, Ranking, rank
from megatron_laser.planner.report import PlanReport, make_report
from megatron_laser.planner.run_file import as_overrides, as_yaml, changed, differences, read_run, whole_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def machine(**changes: object) -> Machine:
    """A made-up one: an H100 with other numbers."""
    return dataclasses.replace(read_machine("h100"), name="made_up", **changes)


def report(
    name: str, gpus: int, on: Machine, *overrides: str, kind: str = "laser", **options: object
) -> PlanReport:
    run = read_run(EXAMPLES / name / f"{kind}.yaml", [f"model.path={EXAMPLES / name}", *overrides])
    return make_report(run, gpus, on, read_assumptions(run.config, None), **options)


@pytest.fixture(scope="module")
def planned() -> PlanReport:
    return report("qwen2.5_32b", 64, machine(price_per_gpu_hour=2.5))


def ranking(planned: PlanReport) -> Ranking:
    assert planned.ranking is not None
    return planned.ranking


def test_32b_fits_64_gpus_as_configured_and_the_best_is_no_slower(planned: PlanReport) -> None:
    configured, best = planned.configured, planned.best
    assert configured is not None and best is not None
    assert (configured.candidate.split.trainer, configured.candidate.split.servers) == (32, 32)
    assert configured.plan == resolve_plan(planned.run.config, 32, planned.machine.memory_gib)
    assert configured.plan.memory.total < planned.machine.memory_gib * 2**30
    assert best.step.seconds <= configured.step.seconds * (1 + TIE)
    assert best.candidate.gpus == 64


def test_every_layout_fits_uses_all_gpus_and_is_before_slower_ones(planned: PlanReport) -> None:
    found = ranking(planned).layouts
    seconds = [one.step.seconds for one in found]
    assert len(found) > 20 and seconds == sorted(seconds)
    for one in found:
        split, layout = one.candidate.split, one.plan.layout
        assert split.trainer + split.servers == 64 and layout.world_size == split.trainer
        assert one.plan.memory.total <= ranking(planned).share * planned.machine.memory_gib * 2**30
        assert split.servers % one.plan.config.rollout.sglang.tensor == 0
    best = ranking(planned).best
    assert best.step.seconds <= seconds[0] * (1 + TIE)


def test_times_are_those_of_predict_step_for_the_whole_configuration(planned: PlanReport) -> None:
    """Nothing is scaled or guessed: the plan is resolved from the configuration anew and predicted again."""
    for one in (*ranking(planned).layouts[:3], ranking(planned).layouts[-1]):
        plan = resolve_plan(one.plan.config, one.candidate.split.trainer, planned.machine.memory_gib)
        again = predict_step(plan, planned.machine, planned.assumptions, one.candidate.split.servers)
        assert plan == one.plan and again == one.step


def test_advice_is_predicted_again_and_sorted_by_gain(planned: PlanReport) -> None:
    best = planned.best
    assert best is not None
    advice = {one.change.name: one for one in planned.advice}
    assert {"one more node of servers", "rollouts one step ahead", "servers in FP8", "context 2"} <= set(
        advice
    )
    fitting = [one.gain for one in planned.advice if one.fits]
    assert fitting == sorted(fitting, reverse=True)
    for one in planned.advice:
        split = one.change.split
        plan = resolve_plan(
            changed(best.plan.config, one.change.settings), split.trainer, planned.machine.memory_gib
        )
        step = predict_step(plan, planned.machine, planned.assumptions, split.servers)
        assert one.ranked.step == step and one.gain == best.step.seconds - step.seconds
        assert one.fits == (plan.memory.total <= planned.machine.memory_gib * 2**30)
    more = advice["one more node of servers"]
    assert more.ranked.candidate.gpus == 72 and more.gain > 0
    assert more.ranked.gpu_hours == pytest.approx(72 * more.ranked.step.seconds * 1000 / 3600)


def test_the_written_overrides_and_the_written_file_resolve_to_the_same_plan(
    planned: PlanReport, tmp_path: Path
) -> None:
    best, config = planned.best, planned.run.config
    assert best is not None
    settings = differences(config, best.plan.config)
    base = [f"model.path={EXAMPLES / 'qwen2.5_32b'}"]
    behind = load_config(EXAMPLES / "qwen2.5_32b" / "laser.yaml", [*base, *as_overrides(settings)])
    pasted = [
        f"{section}={json.dumps(value)}" for section, value in yaml.safe_load(as_yaml(settings)).items()
    ]
    file = tmp_path / "run.yaml"
    file.write_text(whole_run(best.plan.config, ["how it came about"]), encoding="utf-8")
    for loaded in (
        behind,
        load_config(EXAMPLES / "qwen2.5_32b" / "laser.yaml", [*base, *pasted]),
        load_config(file),
    ):
        assert resolve_plan(loaded, best.candidate.split.trainer, planned.machine.memory_gib) == best.plan


def test_8_gpus_are_refused_with_arithmetic_that_adds_up() -> None:
    with pytest.raises(NothingFits) as error:
        report("qwen2.5_32b", 8, machine())
    text = str(error.value)
    # 2 + 4 + 12 bytes a parameter of a quarter of the model, of which tensor 4 has one.
    assert (
        "no layout fits 8 GPUs of" in text and "137.32 GiB a rank of 4, at 32,763,876,352 parameters" in text
    )
    assert "its largest lines: optimizer 91.55 GiB" in text
    assert "16 GPUs, which fit" in text and "optimizer.moments_dtype: bfloat16" in text
    assert report("qwen2.5_32b", 16, machine()).best is not None


def test_a_model_that_no_server_can_hold_is_refused_for_that() -> None:
    with pytest.raises(NothingFits, match=r"a server must hold the weights, 61\.03 GiB in bfloat16"):
        report("qwen2.5_32b", 2, machine(memory_gib=40.0))


def test_a_refusal_of_3_gpus_asks_for_whole_nodes() -> None:
    with pytest.raises(NothingFits, match=r"no layout (fits|on) 3 GPUs(.|\n)*16 GPUs, which fit"):
        report("qwen2.5_32b", 3, machine())


def test_one_gpu_gets_a_colocated_server_whatever_min_servers_was() -> None:
    best = report("qwen2.5_7b", 1, machine(memory_gib=139.8), "rollout.min_servers=2").best
    assert best is not None and best.candidate.split == Split(1, 0, "colocated")
    rollout = best.plan.config.rollout
    assert (rollout.min_servers, rollout.sglang.servers) == (1, 1)


def test_what_has_no_trainer_is_not_planned() -> None:
    with pytest.raises(ConfigError, match=r"run\.mode: rollout_only has no trainer"):
        report("qwen2.5_7b", 8, machine(), "run.mode=rollout_only")


def test_smaller_gpus_take_more_room_saving_never_less() -> None:
    """On GPUs with half of the memory the best layout is slower, and it saves memory somewhere."""
    large, small = (report("qwen2.5_7b", 8, machine(memory_gib=gib)).best for gib in (80.0, 36.0))
    assert large is not None and small is not None
    assert small.step.seconds > large.step.seconds
    assert small.plan.memory.total <= 36 * 2**30 < large.plan.memory.total


def test_experts_are_cut_in_ways_that_their_number_and_the_ranks_allow() -> None:
    planned = report("qwen3_30b_a3b", 16, machine(), kind="laser_4_nodes")
    found = [one.plan.layout for one in ranking(planned).layouts]
    assert planned.configured is not None and planned.configured.plan.layout.expert == 8
    assert len({layout.expert for layout in found}) > 2
    assert {layout.tensor for layout in found} <= {1, 2, 4}  # 4 key/value heads
    for layout in found:
        assert layout.expert_data * layout.expert * layout.pipeline == layout.world_size


def test_a_bare_config_json_gets_a_default_run_around_it() -> None:
    run = read_run(EXAMPLES / "qwen3_30b_a3b" / "config.json", ["rollout.samples_per_prompt=4"])
    rollout = run.config.rollout
    assert run.is_default and "128 prompts x 4 samples" in run.default_of
    assert (rollout.prompts_per_step, rollout.max_new_tokens, rollout.engine) == (128, 8192, "sglang")
    assert run.config == read_run(EXAMPLES / "qwen3_30b_a3b", ["rollout.samples_per_prompt=4"]).config
    planned = make_report(run, 16, machine(), read_assumptions(run.config, None))
    assert planned.configured is None and planned.best is not None
    assert planned.best.plan.architecture.moe is not None


def test_a_default_run_fits_the_positions_of_the_model(tmp_path: Path) -> None:
    shape = json.loads((EXAMPLES / "qwen2.5_7b" / "config.json").read_text()) | {
        "max_position_embeddings": 4096
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = read_run(tmp_path).config
    assert config.data.max_prompt_tokens + config.rollout.max_new_tokens == 4096


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "the folder has no config.json"),
        ("other.json", "got another JSON file"),
        ("run.yaml", "no such file"),
    ],
)
def test_what_is_no_run_and_no_model_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=expected):
        read_run(tmp_path / name)


def test_gpus_are_shared_out_in_whole_nodes_and_very_many_in_steps() -> None:
    base = base_plan(read_run(EXAMPLES / "qwen2.5_32b").config, machine())

    def trainers(gpus: int) -> list[int]:
        return [split.trainer for split in splits(base.config, base.architecture, gpus, machine())]

    assert trainers(8) == [1, 2, 3, 4, 5, 6, 7] and trainers(32) == [8, 16, 24]
    assert trainers(1024) == [64 * step for step in range(1, 16)]
    with pytest.raises(
        ConfigError, match="--gpus 12: more than one node of 8, expected whole nodes: 8 or 16"
    ):
        trainers(12)


def test_servers_hold_the_weights_and_one_longest_sequence() -> None:
    config = read_run(EXAMPLES / "qwen2.5_32b").config
    arch = base_plan(config, machine()).architecture
    # 61.03 GiB of weights and 256 KiB a token, 2.5 GiB, of 0.85 of the memory.
    assert server_tensors(config, arch, 8, machine(memory_gib=79.1)) == [1, 2, 4, 8]
    assert server_tensors(config, arch, 8, machine(memory_gib=74.0)) == [2, 4, 8]
    assert server_tensors(config, arch, 8, machine(memory_gib=24.0)) == [4, 8]


def test_the_cheapest_recomputation_that_fits_is_proposed() -> None:
    """Qwen2.5-32B, tensor 8, on 32 ranks: by the memory sum alone."""
    base = base_plan(
        load_config(EXAMPLES / "qwen2.5_32b" / "laser.yaml", [f"model.path={EXAMPLES / 'qwen2.5_32b'}"]),
        machine(),
    )
    split, shape = Split(32, 32, "apart"), Shape(tensor=8, pipeline=2)
    roomy = Proposer(base, machine(memory_gib=79.1), 0.9).fitting(split, shape, 16384, 4)
    assert [one.plan.config.model.recompute for one in roomy] == ["none"]
    tight = Proposer(base, machine(memory_gib=48.0), 0.9).fitting(split, shape, 16384, 4)
    first = tight[0].plan.config
    assert first.model.recompute == ("mlp",) and not first.optimizer.offload
    assert Proposer(base, machine(memory_gib=20.0), 0.9).fitting(split, shape, 16384, 4) == []


def test_a_configured_layout_that_cannot_run_is_said_and_others_are_searched() -> None:
    planned = report("qwen2.5_7b", 8, machine(), "parallel.tensor=8", "rollout.sglang.servers=2")
    assert planned.configured is None and planned.best is not None
    assert any("expected a multiple" in why or "not divisible" in why for why in planned.not_configured)
    with pytest.raises(ConfigError, match=r"--server-gpus 4: rollout\.engine in_process has no GPUs"):
        base = base_plan(read_run(EXAMPLES / "qwen2.5_7b", ["rollout.engine=in_process"]).config, machine())
        as_configured(base, 8, machine(), 4)


def test_the_search_does_not_depend_on_the_configured_layout() -> None:
    planned = report("qwen2.5_7b", 8, machine())
    other = changed(
        planned.run.config, {"parallel.tensor": 1, "parallel.sequence": False, "optimizer.offload": True}
    )
    again = rank(base_plan(other, planned.machine), 8, planned.machine, planned.assumptions)
    best = planned.best
    assert best is not None and again.best.step == best.step and again.best.plan.layout == best.plan.layout


def test_more_servers_never_shorten_the_longest_response() -> None:
    """However few responses each of many servers has, one of them has the longest, which takes its positions."""
    base = base_plan(read_run(EXAMPLES / "qwen2.5_7b", ["rollout.sglang.tensor=4"]).config, machine())
    assumed = read_assumptions(base.config)
    seconds = [
        predict_step(base, machine(), assumed, gpus).phase("generate").seconds for gpus in (8, 64, 512, 4096)
    ]
    assert seconds == sorted(seconds, reverse=True)
    weights = base.parameters * 2 / 4 / (machine().memory_bandwidth * machine().bandwidth_efficiency)
    assert seconds[-1] > 0.9 * 8192 * weights

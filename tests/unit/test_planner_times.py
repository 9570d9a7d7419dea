"""Seconds of each phase on a machine of round numbers, worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_laser.config.model_folder.flops import attention_flops, head_flops, layer_flops_per_token
from megatron_laser.config.plan.resolve import Plan, resolve_plan
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import ConfigError
from megatron_laser.planner.assumptions import Assumptions, read_assumptions
from megatron_laser.planner.generation import _Server, _simulate
from megatron_laser.planner.machine import Machine, read_machine
from megatron_laser.planner.phase_times import StepTime, predict_step

MACHINE = Machine(
    name="made up",
    device="cuda",
    gpus_per_node=8,
    memory_gib=64.0,
    matmul_flops={"float32": 1e9, "bfloat16": 2e9},
    memory_bandwidth=1e9,
    node_bandwidth=1e8,
    network_bandwidth=1e7,
    host_bandwidth=1e8,
    disk_bandwidth=1e8,
    node_latency=0.0,
    network_latency=0.0,
    forward_efficiency=0.5,
    backward_efficiency=0.25,
    expert_efficiency=1.0,
    head_efficiency=0.5,
    prefill_efficiency=0.5,
    decode_efficiency=1.0,
    bandwidth_efficiency=1.0,
    link_efficiency=1.0,
    overlap=0.0,
    layer_overhead=0.0,
    step_overhead=0.0,
    decode_overhead=0.0,
    row_overhead=0.0,
    request_overhead=0.0,
)
PROMPT, RESPONSE, SAMPLES = 8, 4, 16
ASSUMED = Assumptions.of_lengths(
    [PROMPT], [RESPONSE], base=Assumptions(grading_seconds=0.0, imbalance=0.0, prefix_cached=1.0)
)
BASE = Path(__file__).parents[1] / "data" / "tiny_model"


def plan(world_size: int = 1, **changes: dict) -> Plan:
    settings: dict = {
        "model": {"path": str(BASE), "dtype": "float32", "vocab_multiple": 1, "keep_logits_gib": None},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 16},
        "rollout": {
            "engine": "in_process",
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_new_tokens": 16,
        },
        "laser": {"enabled": False},
        "policy": {"old_logprobs": "recompute", "minibatches": 1},
        "batching": {"tokens_per_micro_batch": 4096},
        "run": {"steps": 1, "output_dir": "unused"},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return resolve_plan(RunConfig.model_validate(settings), world_size, MACHINE.memory_gib)


def predicted(
    machine: Machine = MACHINE, world_size: int = 1, assumed: Assumptions = ASSUMED, **changes: dict
) -> StepTime:
    return predict_step(plan(world_size, **changes), machine, assumed)


# Of the tiny model: hidden 64, 4 layers, 4 heads and 2 for keys and values of 16, MLP of 128, 40 tokens.
LAYER = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
PAIRS = (PROMPT + RESPONSE) * (PROMPT + RESPONSE + 1) // 2
ATTENTION = 4 * 4 * 16 * PAIRS
HEAD = 2 * 64 * 40


def test_flops_of_the_model_are_those_that_are_reckoned_with_here() -> None:
    arch = plan().architecture
    assert layer_flops_per_token(arch) == LAYER
    assert attention_flops(arch, PROMPT + RESPONSE) == ATTENTION
    assert head_flops(arch, 1) == HEAD


def test_logprob_is_a_forward_at_its_efficiency() -> None:
    parts = predicted().phase("logprob").parts
    assert parts["layers"] == pytest.approx(SAMPLES * 12 * 4 * LAYER / 0.5e9)
    assert parts["attention"] == pytest.approx(SAMPLES * 4 * ATTENTION / 0.5e9)
    assert parts["head"] == pytest.approx(SAMPLES * RESPONSE * HEAD / 0.5e9)


def test_train_is_a_forward_and_two_products_for_each_in_the_backward() -> None:
    parts = predicted().phase("train").parts
    assert parts["layers"] == pytest.approx(SAMPLES * 12 * 4 * LAYER * (1 / 0.5e9 + 2 / 0.25e9))
    assert parts["head"] == pytest.approx(3 * SAMPLES * RESPONSE * HEAD / 0.5e9)


def test_on_a_cpu_a_prompt_is_packed_once_for_its_group() -> None:
    parts = predicted(replace(MACHINE, device="cpu")).phase("logprob").parts
    # Seven tokens of the prompt once, its last one before each of four responses of four tokens.
    assert parts["layers"] == pytest.approx(4 * (7 + 4 + 16) * 4 * LAYER / 0.5e9)
    prompt = 4 * 4 * 16 * PROMPT * (PROMPT + 1) // 2
    assert parts["attention"] == pytest.approx(4 * 4 * (4 * ATTENTION - 3 * prompt) / 0.5e9)
    apart = predicted(replace(MACHINE, device="cpu"), batching={"share_prompts": False})
    assert apart.phase("logprob").parts["layers"] == pytest.approx(SAMPLES * 12 * 4 * LAYER / 0.5e9)


def test_on_a_cpu_what_all_prompts_begin_with_is_packed_once_for_a_micro_batch() -> None:
    cpu, assumed = replace(MACHINE, device="cpu"), replace(ASSUMED, common_tokens=5.0)
    parts = predicted(cpu, assumed=assumed).phase("logprob").parts
    # Five tokens once, two more of each of four prompts, its last token and a response of four for each sample.
    assert parts["layers"] == pytest.approx((5 + 4 * 2 + 16 * 5) * 4 * LAYER / 0.5e9)


def test_the_optimizer_moves_its_state_at_its_share_of_the_bandwidth() -> None:
    size = plan().bytes_per_rank
    moved = 2 * size.optimizer + 2 * size.gradients + size.weights
    assert predicted().phase("train").parts["optimizer"] == pytest.approx(moved / 1e9)
    slow = replace(MACHINE, optimizer_efficiency=0.25)
    assert predicted(slow).phase("train").parts["optimizer"] == pytest.approx(4 * moved / 1e9)


def test_gradients_go_once_around_the_data_parallel_ranks() -> None:
    sent = 2 * plan(2).bytes_per_rank.gradients * 1 / 2  # an all-reduce of two ranks
    assert predicted(world_size=2).phase("train").parts["gradients"] == pytest.approx(sent / 1e8)
    apart = replace(MACHINE, gpus_per_node=1)
    assert predicted(apart, world_size=2).phase("train").parts["gradients"] == pytest.approx(sent / 1e7)


def test_a_ring_over_nodes_uses_the_ports_of_all_its_ranks_in_a_node() -> None:
    # Nodes of 4 with links of 1e8 in them and a port of 1e7 for each GPU.
    machine = replace(MACHINE, gpus_per_node=4)
    assert machine.bandwidth(4) == machine.bandwidth(4, 1) == 1e8
    assert machine.bandwidth(8) == 1e7
    assert [machine.bandwidth(8, stride) for stride in (1, 2, 4, 8)] == [4e7, 2e7, 1e7, 1e7]
    assert replace(machine, network_bandwidth=5e7).bandwidth(8, 1) == 1e8


def test_a_sync_gathers_stages_from_as_far_as_they_are() -> None:
    whole = plan().parameters * 4
    layout = {"parallel": {"pipeline": 2}}
    near = predicted(world_size=4, **layout).phase("sync").parts["gathering"]
    assert near == pytest.approx(whole / 2 / 1e8)
    # Two data-parallel ranks are a node, so that the other stage is in another one.
    far = (
        predicted(replace(MACHINE, gpus_per_node=2), world_size=4, **layout).phase("sync").parts["gathering"]
    )
    assert far == pytest.approx(whole / 2 / 1e7)


def test_logits_that_were_not_kept_are_made_again_on_the_last_stage_alone() -> None:
    again = predicted(model={"keep_logits_gib": 0.0}).phase("train").parts["recomputed"]
    assert again == pytest.approx(SAMPLES * RESPONSE * HEAD / 0.5e9)
    assert "recomputed" not in predicted(model={"keep_logits_gib": 1.0}).phase("train").parts


def test_one_overhead_a_layer_and_pass() -> None:
    machine = replace(MACHINE, layer_overhead=1.0, step_overhead=10.0)
    step = predicted(machine)
    assert step.phase("logprob").parts["overhead"] == pytest.approx(4.0)
    assert step.phase("train").parts["overhead"] == pytest.approx(3 * 4 + 10.0)


def test_a_prompt_is_prefilled_once_a_group_and_a_common_beginning_once() -> None:
    def products(tokens: int) -> int:
        return 4 * (tokens * LAYER + 4 * 4 * 16 * tokens * (tokens + 1) // 2)

    alone = predicted().phase("generate").parts["prefill"]
    assert alone == pytest.approx(4 * (products(PROMPT) + HEAD) / 0.5e9)
    shared = predicted(assumed=replace(ASSUMED, common_tokens=5.0)).phase("generate").parts["prefill"]
    assert shared == pytest.approx((4 * (products(PROMPT) - products(5) + HEAD) + products(5)) / 0.5e9)


def test_decoding_takes_the_longer_of_reading_and_computing() -> None:
    server = _Server(
        fixed=1.0, read=10.0, experts=0.0, chance=0.0, cache=0.5, row=3.0, pair=0.0, row_overhead=0.0
    )
    # Three rows of ten tokens: 10 + 3 x 10 x 0.5 to read, 9 to compute.
    assert server.position(3, 10) == (pytest.approx(1.0 + 25.0), True)
    assert server.position(10, 0) == (pytest.approx(1.0 + 30.0), False)


def test_experts_are_read_that_any_row_goes_to() -> None:
    server = _Server(
        fixed=0.0, read=0.0, experts=8.0, chance=0.5, cache=0.0, row=0.0, pair=0.0, row_overhead=0.0
    )
    assert server.position(1, 0)[0] == pytest.approx(4.0)
    assert server.position(2, 0)[0] == pytest.approx(6.0)


def test_a_batch_shrinks_as_its_responses_end_and_the_longest_are_waited_for() -> None:
    server = _Server(
        fixed=0.0, read=0.0, experts=0.0, chance=0.0, cache=0.0, row=1.0, pair=0.0, row_overhead=0.0
    )
    # One second a row and position: lengths 1 to 4 are ten of them, whether they run side by side or in two waves.
    whole = _simulate(server, 4, 4, 0, (1, 2, 3, 4), False)
    assert whole.reading + whole.computing == pytest.approx(10.0)
    memory = replace(server, row=0.0, read=1.0)
    assert _simulate(memory, 4, 4, 0, (1, 2, 3, 4), False).reading == pytest.approx(4.0)
    # One at a time, each position is read for alone.
    assert _simulate(memory, 4, 1, 0, (1, 2, 3, 4), False).reading == pytest.approx(10.0)


def test_in_process_rows_that_have_ended_stay_until_they_are_a_quarter_of_the_batch() -> None:
    server = _Server(
        fixed=0.0, read=0.0, experts=0.0, chance=0.0, cache=0.0, row=1.0, pair=0.0, row_overhead=0.0
    )
    found = _simulate(server, 8, 8, 0, tuple(range(1, 9)), True)
    assert found.computing == pytest.approx(8 + 8 + 6 + 6 + 4 + 3 + 2 + 1)
    # Two batches of four, one behind the other; of 1, 2, 3 and 4 tokens every row that ends is a quarter.
    found = _simulate(server, 8, 4, 0, (4,), True)
    assert found.computing == pytest.approx(8 * 4)


def test_the_sync_copies_all_weights_and_takes_something_for_each_tensor() -> None:
    size = plan().parameters * 4
    tensors = 4 * 9 + 3
    parts = predicted(replace(MACHINE, tensor_overhead=0.5)).phase("sync").parts
    assert parts == {"copy": pytest.approx(2 * size / 1e9), "tensors": pytest.approx(tensors * 0.5)}


def test_grading_counts_where_it_takes_longer_than_the_generation() -> None:
    slow = predicted(assumed=replace(ASSUMED, grading_seconds=100.0), reward={"workers": 2})
    generating = slow.phase("generate").seconds
    assert slow.phase("grade").seconds == pytest.approx(SAMPLES * 100.0 / 2 - generating)


def test_phases_are_their_parts_and_the_step_is_its_phases() -> None:
    step = predicted()
    for phase in step.phases:
        assert phase.seconds == pytest.approx(sum(phase.parts.values()))
    assert step.seconds == pytest.approx(sum(phase.seconds for phase in step.phases))
    assert step.phase(step.bottleneck).seconds == max(phase.seconds for phase in step.phases)


@pytest.mark.parametrize(
    "field", ["memory_bandwidth", "node_bandwidth", "network_bandwidth", "host_bandwidth"]
)
def test_more_bandwidth_is_never_slower(field: str) -> None:
    seconds = [
        predicted(replace(MACHINE, **{field: getattr(MACHINE, field) * factor}), world_size=2).seconds
        for factor in (1, 2, 8, 64)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_more_data_parallel_ranks_never_compute_longer() -> None:
    fast = replace(MACHINE, node_bandwidth=1e15)
    train = [predicted(fast, world_size=ranks).phase("train").seconds for ranks in (1, 2, 4)]
    assert train == sorted(train, reverse=True)
    assert train[2] < train[0]


def machine_file(folder: Path, **changes: object) -> Path:
    file = folder / "machine.yaml"
    file.write_text(yaml.safe_dump(changes))
    return file


def test_a_file_takes_what_it_leaves_out_from_its_base(tmp_path: Path) -> None:
    machine = read_machine(
        machine_file(tmp_path, base="h100", memory_bandwidth=1e12, optimizer_efficiency=0.3)
    )
    assert (machine.memory_bandwidth, machine.optimizer_efficiency) == (1e12, 0.3)
    assert machine.matmul_flops == read_machine("h100").matmul_flops
    assert machine.sources["memory_bandwidth"] == "machine.yaml"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"memory_bandwidth": -1}, "memory_bandwidth: -1, expected a number, more than 0"),
        ({"overlap": 2}, "overlap: 2, expected a number, 0 or more, at most 1"),
        ({"matmul_flops": {"bfloat16": "fast"}}, "matmul_flops.bfloat16: 'fast'"),
        ({"device": "tpu"}, "device: 'tpu', expected cuda or cpu"),
        ({"optimizer_efficiency": 0}, "optimizer_efficiency: 0, expected a number, more than 0"),
        ({"speed": 3}, "speed: no such field"),
        ({"base": "a100"}, "base: 'a100' is none of h100, h200, b200"),
    ],
)
def test_a_bad_machine_file_says_which_field(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        read_machine(machine_file(tmp_path, **{"base": "h100", **changes}))


def test_a_file_without_a_base_needs_all_that_has_no_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_machine(machine_file(tmp_path, device="cpu"))
    text = str(error.value)
    assert "memory_bandwidth: missing" in text
    assert "tensor_overhead" not in text
    assert "price_per_gpu_hour" not in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens: 0, expected a number, 1 or more"),
        ({"prefix_cached": 1.5}, "prefix_cached: 1.5, expected a number, 0 to 1"),
        ({"responses": [3, "x"]}, "responses: expected a list of lengths"),
        ({"length": 3}, "length: no such assumption"),
    ],
)
def test_a_bad_assumptions_file_says_which_field(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_assumptions(plan().config, machine_file(tmp_path, **changes))


@pytest.mark.parametrize("name", ["nothing.yaml", "h1000", "."])
def test_files_that_are_not_there_are_said_to_be_machines_or_assumptions(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such machine or file; known are h100"):
        read_machine(tmp_path / name)
    with pytest.raises(ConfigError, match="expected a YAML file with some assumptions"):
        read_assumptions(plan().config, tmp_path / name)


def test_measured_lengths_keep_their_mean() -> None:
    lengths = Assumptions.of_lengths([10], list(range(1, 2001))).lengths(4000)
    assert sum(lengths) / len(lengths) == pytest.approx(1000.5, rel=0.01)

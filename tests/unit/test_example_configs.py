"""The recipes for real models: they load, hold the paper's settings, fit the models, and say what they need."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import RunConfig, load_config, resolve_plan
from megatron_laser.config.derived import data_sources
from megatron_laser.config.layers import read_layers
from megatron_laser.config.plan.features import rollout_features
from megatron_laser.evaluation.benchmarks.settings import benchmark_rows, load_benchmarks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROOT = EXAMPLES.parent

# name: (trainer processes, rollout nodes, score token, c_ref, reasoning warm-up)
RECIPES = {
    "qwen2.5_7b": (4, 1, "<|vision_start|>", -23.0, 200),
    "orz_7b": (4, 1, "<|vision_start|>", -23.0, 0),
    "octothinker_3b": (4, 1, 128002, -25.0, 200),
    "qwen2.5_32b": (32, 4, "<|vision_start|>", -23.0, 200),
    "qwen3_30b_a3b": (32, 4, "<|vision_start|>", -23.0, 200),
    "qwen3_4b_general": (4, 1, "<|vision_start|>", -23.0, 200),
}
# (folder, file): trainer processes. Recipes for another length or another number of nodes.
VARIANTS = {
    ("qwen2.5_32b", "laser_32k"): 32,
    ("qwen2.5_32b", "grpo_32k"): 32,
    ("qwen3_30b_a3b", "laser_4_nodes"): 16,
}
RUNS = [(name, kind) for name in RECIPES for kind in ("laser", "grpo")]


def load(name: str, kind: str, *overrides: str) -> RunConfig:
    return load_config(EXAMPLES / name / f"{kind}.yaml", [f"model.path={EXAMPLES / name}", *overrides])


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_the_dry_run_passes_from_the_repository_alone(name: str, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    command = ["train", f"examples/{name}/{kind}.yaml", "--dry-run", f"model.path=examples/{name}"]
    for world_size in {
        RECIPES[name][0],
        2 * RECIPES[name][0],
    }:  # as written, and with twice the trainer's GPUs
        result = CliRunner().invoke(app, [*command, "--world-size", str(world_size)])
        assert result.exit_code == 0, result.output
        assert f"{world_size} ranks" in result.output
        assert "sglang: " in result.output


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_the_layout_leaves_room_on_an_80_gb_gpu(name: str, kind: str) -> None:
    plan = resolve_plan(load(name, kind), RECIPES[name][0])
    # Not needed where all of it fits; with experts some ranks need more than the mean that the sum is of.
    cheap = ("moe_act", "layernorm") if plan.architecture.moe else "none"
    assert plan.config.model.recompute == cheap
    plan.memory.check(
        0.8 * plan.gpu_memory_gib * 2**30
    )  # no measurement stands behind the sum yet: leave room


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_run_stops_when_trainer_and_engine_disagree(name: str, kind: str) -> None:
    assert load(name, kind).policy.mismatch_abort == 0.05


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_the_settings_are_the_papers(name: str, kind: str) -> None:
    config = load(name, kind)
    _, _, token, ref_logprob, warmup = RECIPES[name]
    laser, policy, rollout = config.laser, config.policy, config.rollout
    assert laser.enabled == (kind == "laser")
    if kind == "laser":
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


@pytest.mark.parametrize("name", RECIPES)
def test_laser_and_its_baseline_differ_in_laser_alone(name: str) -> None:
    ours, theirs = (load(name, kind).model_dump(mode="json") for kind in ("laser", "grpo"))
    for settings in (ours, theirs):
        del settings["laser"], settings["run"]["output_dir"], settings["run"]["name"]
        del settings["rollout"]["sglang"]["endpoints"]
    assert ours == theirs


@pytest.mark.parametrize("name", RECIPES)
def test_servers_use_all_gpus_of_a_rollout_node_or_what_the_trainer_leaves(name: str) -> None:
    processes, rollout_nodes, *_ = RECIPES[name]
    sglang = load(name, "laser").rollout.sglang
    gpus = sglang.servers * sglang.tensor
    assert gpus == (8 if rollout_nodes > 1 else 8 - processes)
    assert sglang.endpoints is not None and sglang.endpoints.suffix == ""  # a folder: one file a node


@pytest.mark.parametrize("name", RECIPES)
def test_the_score_of_the_servers_can_replace_the_old_policy_pass(name: str) -> None:
    config = load(name, "laser", "policy.old_logprobs=on_policy", "laser.score_source=server")
    plan = resolve_plan(config, RECIPES[name][0])
    assert [item.on for item in plan.features if item.name == "old-policy pass"] == [False]


@pytest.mark.parametrize("name", RECIPES)
def test_the_readme_names_commands_and_the_memory_that_the_plan_computes(name: str) -> None:
    processes = RECIPES[name][0]
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    plan = resolve_plan(load(name, "laser"), processes)
    size, memory = plan.bytes_per_rank, plan.memory
    activations = next(line.bytes for line in memory.lines if line.name == "activations")
    parts = (size.weights, size.gradients, size.optimizer, size.total, activations, memory.total)
    for part in parts:
        assert f"{part / 2**30:.1f} GiB" in text
    two_steps = "rollout.prompts_per_step=8", "rollout.max_new_tokens=512"
    assert all(setting in text for setting in two_steps)
    small = resolve_plan(load(name, "laser", *two_steps), processes).memory
    assert f"sum {memory.total / 2**30:.2f} GiB of 79.1" in text  # the ten commands
    assert f"{small.total / 2**30:.2f} GiB a GPU" in text
    for needed in (
        "has not been run",
        "megatron-laser serve examples/" if RECIPES[name][1] > 1 else "one_node.sh",
        "torchrun",
        "sbatch",
        f"--dry-run --world-size {processes}",
    ):
        assert needed in text, f"{name}/README.md does not mention {needed!r}"
    for path in re.findall(r"examples/[\w./-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), f"{name}/README.md names {path}"


@pytest.mark.parametrize("name", RECIPES)
def test_config_json_is_that_of_the_model(name: str) -> None:
    config = json.loads((EXAMPLES / name / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    parameters = resolve_plan(load(name, "laser"), RECIPES[name][0]).parameters
    published = {
        "qwen2.5_7b": 7.62e9,
        "orz_7b": 7.62e9,
        "octothinker_3b": 3.21e9,
        "qwen2.5_32b": 32.8e9,
        "qwen3_30b_a3b": 30.5e9,
        "qwen3_4b_general": 4.02e9,
    }
    assert abs(parameters / published[name] - 1) < 0.005


@pytest.mark.parametrize(("name", "kind"), VARIANTS)
def test_a_variant_fits_and_its_readme_has_the_plans_numbers(name: str, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    processes = VARIANTS[name, kind]
    command = ["train", f"examples/{name}/{kind}.yaml", "--dry-run", f"model.path=examples/{name}"]
    result = CliRunner().invoke(app, [*command, "--world-size", str(processes)])
    assert result.exit_code == 0, result.output
    plan = resolve_plan(load(name, kind), processes)
    plan.memory.check(0.8 * plan.gpu_memory_gib * 2**30)
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    size, memory = plan.bytes_per_rank, plan.memory
    activations = next(line.bytes for line in memory.lines if line.name == "activations")
    assert memory.host == size.optimizer  # away between updates
    for part in (size.weights, size.gradients, size.optimizer, activations, memory.total):
        assert f"{part / 2**30:.1f} GiB" in text
    assert f"{8 * memory.host / 2**30:.0f} GiB a node" in text
    note = f"{memory.host / 2**30:.0f} GiB a rank, {8 * memory.host / 2**30:.0f} GiB a node"
    layers = read_layers(EXAMPLES / name / f"{kind}.yaml")
    assert any(note in layer.path.read_text(encoding="utf-8") for layer in layers)
    if kind.startswith("laser"):
        assert f"{kind}.yaml --dry-run --world-size {processes}" in text


@pytest.mark.parametrize(("name", "kind"), VARIANTS)
def test_a_variant_learns_as_its_recipe_does(name: str, kind: str) -> None:
    """Layout, where state lies, lengths and how long one waits for them: nothing else is different."""
    base = kind.split("_")[0]
    ours, recipe = (load(name, each).model_dump(mode="json") for each in (kind, base))
    for settings in (ours, recipe):
        del settings["parallel"], settings["batching"], settings["optimizer"]["offload"]
        for key in ("max_new_tokens", "deadline", "min_servers"):
            del settings["rollout"][key]
        del settings["run"]["output_dir"], settings["run"]["name"], settings["rollout"]["sglang"]["endpoints"]
    assert ours == recipe
    assert load(name, kind).run.output_dir.name == kind


def test_long_responses_fit_because_two_ranks_share_them() -> None:
    plan = resolve_plan(load("qwen2.5_32b", "laser_32k"), 32)
    assert plan.context is not None and plan.context.ranks == 2 and plan.context.needed
    assert plan.context.longest == 32768 and plan.config.batching.balance == "flops"


def test_every_folder_with_a_model_is_tested_here() -> None:
    found = {(path.parent.name, path.stem) for path in EXAMPLES.glob("*/*.yaml")}
    small = ("tiny_sum", "smollm2")  # for CPUs, with models that are made or fetched: tested by running them
    assert {run for run in found if run[0] not in small} == {*RUNS, *VARIANTS}
    assert {path.parent.name for path in EXAMPLES.glob("*/config.json")} == set(RECIPES)
    lists = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
    assert lists == [
        "benchmarks.yaml",
        "benchmarks_general.yaml",
        "paper.yaml",
    ]  # no runs: for `eval`, and a base


def test_general_reasoning_has_a_verifier_for_texts_and_one_for_choices_and_asks_for_its_own_reference() -> (
    None
):
    config = load("qwen3_4b_general", "laser")
    assert [source.reward for source in data_sources(config, "train")] == ["free_text"]
    validation = [(source.name, source.reward) for source in data_sources(config, "validation")]
    assert validation == [("mmlu_pro", "multiple_choice"), ("gpqa_diamond", "multiple_choice")]
    readme = " ".join((EXAMPLES / "qwen3_4b_general" / "README.md").read_text(encoding="utf-8").split())
    assert (
        "`laser.ref_logprob` must be measured for this model" in readme
        and "megatron-laser calibrate" in readme
    )
    assert "id 151652" in readme and "laser.ref_logprob=MEASURED" in readme


def test_benchmarks_of_general_reasoning_are_read_from_what_the_data_tool_writes(tmp_path: Path) -> None:
    data = tmp_path / "out.jsonl"
    answer = json.dumps({"answer": "B", "options": ["x", "y"]})
    data.write_text(json.dumps({"problem": "Which?\n\nA. x\nB. y", "answer": answer}) + "\n")
    overrides = [f"{name}.path={data}" for name in ("mmlu_pro", "gpqa_diamond")]
    found = load_benchmarks(EXAMPLES / "benchmarks_general.yaml", overrides, from_run={"reward": "free_text"})
    assert [(one.name, one.samples, one.reward) for one in found] == [
        ("mmlu_pro", 1, "multiple_choice"),
        ("gpqa_diamond", 8, "multiple_choice"),
    ]
    assert benchmark_rows(found[0], look=True)[0].answer == answer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"engine": "in_process"}, ["in_process: rank 0 generates, up to 256 sequences at once"]),
        (
            {"urls": ["http://10.0.0.5:1", "http://10.0.0.6:1"]},
            ["2 servers at the addresses", "distributed: ", "none: "],
        ),
        ({"servers": 2, "tensor": 4}, ["2 servers x 4 GPUs = 8 GPUs on rank 0's node, started by the run"]),
        (
            {"device": "cpu", "router": True},
            ["1 server on the CPU on rank 0's node, started by the run, behind a router"],
        ),
    ],
)
def test_the_plan_says_who_generates(tmp_path: Path, settings, expected) -> None:
    from helpers.runs import run_config

    engine = settings.pop("engine", "sglang")
    config = run_config(tmp_path, tmp_path, rollout={"engine": engine, "sglang": settings})
    for (_, _, detail), text in zip(rollout_features(config), expected):
        assert text in detail


def test_the_plan_says_how_old_the_weights_may_be(tmp_path: Path) -> None:
    from helpers.runs import run_config

    config = run_config(
        tmp_path, tmp_path, rollout={"engine": "sglang", "ahead": 1}, policy={"importance_cap": 2.0}
    )
    (line,) = [line for line in rollout_features(config) if line[0] == "off-policy rollout"]
    assert line == ("off-policy rollout", True, "rollout.ahead: 1; tokens are at most 2 steps old")


def test_the_small_example_with_experts_differs_in_the_model_and_its_routers() -> None:
    experts = yaml.safe_load((EXAMPLES / "tiny_sum" / "laser_moe.yaml").read_text())
    assert experts.pop("base") == "laser.yaml"
    assert experts.pop("moe") == {"routing_replay": True}
    assert experts == {"model": {"path": "base_moe"}, "run": {"output_dir": "../../runs/tiny_sum/laser_moe"}}


def test_the_small_example_through_a_server_differs_in_who_generates_and_scores(tmp_path: Path) -> None:
    model = f"model.path={EXAMPLES / 'qwen2.5_7b'}"  # its own is made by prepare.py
    in_process, served = (
        load_config(EXAMPLES / "tiny_sum" / f"{name}.yaml", [model]).model_dump(mode="json")
        for name in ("laser", "laser_sglang")
    )
    assert served["rollout"]["engine"] == "sglang" and served["rollout"]["sglang"]["device"] == "cpu"
    assert served["laser"]["score_source"] == "server" and served["policy"]["old_logprobs"] == "on_policy"
    for settings in (in_process, served):
        for section, key in (
            *(("rollout", key) for key in ("engine", "sglang", "max_concurrency_per_server")),
            ("laser", "score_source"),
            ("policy", "old_logprobs"),
            ("run", "output_dir"),
            ("run", "name"),
        ):
            del settings[section][key]
    assert in_process == served

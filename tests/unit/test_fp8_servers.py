"""FP8 rollouts: how servers are started, which are taken, what is refused, and what the dry run says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.plain_http import answering
from helpers.runs import run_config
from test_client_identify import EXPECTED, open_engine, sglang
from test_servers_command import command_of

from megatron_laser.config import ConfigError, read_architecture
from megatron_laser.config.checks.rollout import quantization_warnings
from megatron_laser.config.model_folder.quantized import block_problems, quantized_bytes
from megatron_laser.config.plan.features import rollout_features
from megatron_laser.config.plan.resolve import resolve_plan
from megatron_laser.rollout.client.errors import ServerMismatch
from megatron_laser.rollout.servers import fp8_gpus
from megatron_laser.rollout.servers.command import FP8_OPTIONS, initial_weight_version
from megatron_laser.rollout.servers.start_checks import check_start

EXAMPLES = Path(__file__).parents[2] / "examples"
FP8 = {"quantization": "fp8"}


def config(folder, *overrides, sglang=None, model=None, **sections):
    sections = {"policy": {"importance_cap": 2.0}, **sections}
    rollout = {"engine": "sglang", **sections.pop("rollout", {}), "sglang": {**FP8, **(sglang or {})}}
    overrides = ("model.dtype=bfloat16", *overrides)
    return run_config(folder, model or folder / "model", *overrides, rollout=rollout, **sections)


# how they are started ----------------------------------------------------------------------------------------------


def test_a_server_is_started_with_the_configuration_of_fp8_blocks(tmp_path):
    made = config(tmp_path)
    settings = command_of(made).settings
    assert settings["quantization"] == "fp8" and settings["enable-fp32-lm-head"] is True
    assert json.loads(settings["json-model-override-args"]) == {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    }
    assert settings["weight-version"] == initial_weight_version(made.rollout.sglang) == "not-sent-yet"


def test_it_is_off_by_default(tmp_path):
    made = config(tmp_path, "rollout.sglang.quantization=null")
    assert not {"quantization", "json-model-override-args", "weight-version"} & set(command_of(made).settings)
    assert initial_weight_version(made.rollout.sglang) == "default"
    assert quantization_warnings(made) == []


# what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "fp8"])
def test_sglangs_own_option_follows_from_the_setting(tmp_path, given):
    options = {"quantization": "w8a8_int8"}
    with pytest.raises(
        ConfigError, match=r"options\.quantization: follows from rollout\.sglang\.quantization"
    ):
        config(tmp_path, sglang={"quantization": given, "options": options})


@pytest.mark.parametrize("name", ["json_model_override_args", "--load-format", "weight_version"])
def test_options_that_decide_how_weights_are_held_are_refused_beside_it(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"options\.{name}: follows from rollout\.sglang\.quantization"):
        config(tmp_path, sglang={"options": {name: "x"}})
    config(tmp_path, sglang={"quantization": None, "options": {name: "x"}})


def test_a_warm_up_needs_weights(tmp_path):
    with pytest.raises(ConfigError, match="a warm-up would compute with none"):
        config(tmp_path, sglang={"options": {"skip_server_warmup": False}})


def test_cpus_other_dtypes_and_the_in_process_engine_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fp8 with rollout\.sglang\.device cpu"):
        config(tmp_path, sglang={"device": "cpu"})
    with pytest.raises(ConfigError, match=r"fp8 with model\.dtype float32"):
        config(tmp_path, "model.dtype=float32")
    with pytest.raises(ConfigError, match=r"fp8 needs rollout\.engine: sglang"):
        config(tmp_path, "rollout.engine=in_process")


def test_blocks_must_fill_the_parts_of_a_rank():
    dense = read_architecture(EXAMPLES / "qwen2.5_7b")  # 18,944 rows of 3,584; 4 key heads of 128
    assert block_problems(dense, 1) == block_problems(dense, 2) == block_problems(dense, 4) == []
    assert block_problems(replace(dense, num_key_value_heads=2), 4) == []  # two ranks have the same head
    (problem,) = block_problems(replace(dense, intermediate_size=18_944 + 64), 1)
    assert "a rank has 19008 of the model's intermediate_size" in problem
    (problem,) = block_problems(replace(dense, head_dim=64, num_attention_heads=32, num_key_value_heads=2), 2)
    assert "a rank has 64 of the model's key rows" in problem


@pytest.mark.parametrize(
    ("capabilities", "wrong"),
    [([], None), (["9.0", "8.9"], None), (["8.0"], "8.0"), (["10.0", "9.0", "12.0"], "10.0, 12.0")],
)
def test_gpus_before_ada_and_after_hopper_are_refused(tmp_path, monkeypatch, capabilities, wrong):
    monkeypatch.setattr(fp8_gpus, "_capabilities", lambda: capabilities)
    if wrong is None:
        check_start(config(tmp_path))
    else:
        with pytest.raises(ConfigError, match=f"compute capability {wrong}: SGLang keeps FP8 weights there"):
            check_start(config(tmp_path))
        check_start(config(tmp_path, "rollout.sglang.quantization=null"))


def test_what_is_hardly_wanted_is_a_warning(tmp_path):
    assert quantization_warnings(config(tmp_path)) == []
    assert quantization_warnings(config(tmp_path, policy={"importance_mask": [0.5, 2.0]})) == []
    (line,) = quantization_warnings(config(tmp_path, policy={}))
    assert "nothing corrects for it; set policy.importance_cap" in line
    assert quantization_warnings(config(tmp_path, policy={"old_logprobs": "rollout"})) == []
    (line,) = quantization_warnings(config(tmp_path, "laser.score_source=server"))
    assert "scores for advantages and metrics are of the quantized model" in line


# which servers are taken -------------------------------------------------------------------------------------------

OF_BLOCKS = {
    "quantization": "fp8",
    "json_model_override_args": FP8_OPTIONS["json-model-override-args"],
    "vocab_size": 152,
}
WANTS = replace(EXPECTED, quantization="fp8")


def test_a_server_of_fp8_blocks_is_taken_by_a_run_that_sends_them():
    with answering(sglang(server=OF_BLOCKS)) as url:
        open_engine(url, expected=WANTS)


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({}, "it holds its weights as they are"),
        ({"quantization": "fp8"}, "it holds its weights in fp8, quantized at its start"),
        (
            OF_BLOCKS
            | {"json_model_override_args": OF_BLOCKS["json_model_override_args"].replace("128", "64")},
            "in fp8 in blocks of 64 x 64",
        ),
    ],
)
def test_any_other_server_is_refused_by_it(server, said):
    with answering(sglang(server=server)) as url, pytest.raises(ServerMismatch, match=said):
        open_engine(url, expected=WANTS)


@pytest.mark.parametrize("server", [OF_BLOCKS, {"quantization": "w8a8_int8"}])
def test_a_server_that_quantizes_takes_no_plain_weights(server):
    with answering(sglang(server=server)) as url:
        with pytest.raises(ServerMismatch, match=f"in {server['quantization']} \\(--quantization\\)"):
            open_engine(url)
        open_engine(url, expected=replace(EXPECTED, dtype=None))  # who sends no weights may ask it


def test_a_server_without_weights_is_asked_nothing_and_serves_no_one_but_the_run():
    seen = []
    server = {name: value for name, value in OF_BLOCKS.items() if name != "vocab_size"}
    blank = sglang(info={"weight_version": "not-sent-yet"}, server=server, seen=seen)
    with answering(blank) as url:
        open_engine(url, expected=WANTS)
        assert "/generate" not in [path for path, _ in seen]
        with pytest.raises(ServerMismatch, match="a run, which has sent none yet"):
            open_engine(url, expected=replace(EXPECTED, dtype=None))


# the dry run -------------------------------------------------------------------------------------------------------


def test_the_dry_run_names_it(tmp_path):
    names = {name: detail for name, on, detail in rollout_features(config(tmp_path)) if on}
    assert "not proven on GPUs yet" in names["FP8 rollout"]
    assert "FP8 rollout" not in dict.fromkeys(
        line[0] for line in rollout_features(config(tmp_path, "rollout.sglang.quantization=null"))
    )


def test_colocated_servers_hold_a_byte_for_each_quantized_weight(tmp_path):
    model = EXAMPLES / "qwen2.5_7b"
    arch = read_architecture(model)
    layer = 3584 * (3584 + 2 * 512 + 3584 + 3 * 18944)
    scales = 28 * (28 + 2 * 4 + 28 + 3 * 148)
    plain = 2 * (2 * 152064 * 3584 + 3584 + 28 * (2 * 3584 + 3584 + 2 * 512))
    assert quantized_bytes(arch, 2) == 28 * (layer + 4 * scales) + plain

    def weights(*overrides):
        made = config(
            tmp_path,
            "model.vocab_multiple=128",
            *overrides,
            model=model,
            rollout={"weight_sync": "colocated", "sync_deadline": 50},
            laser={"enabled": False},
        )
        lines = resolve_plan(made, 1, 80.0).memory.lines
        (line,) = [line for line in lines if line.name == "colocated server's weights"]
        return line.detail

    assert weights().startswith("8.11 GiB")
    assert weights("rollout.sglang.quantization=null").startswith("14.19 GiB")

"""What a server is started with: command line, settings file, environment."""

import sys
from pathlib import Path

import pytest
from helpers.executables import write_executable
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.rollout.servers.command import (
    PYTHON_VARIABLE,
    ROUTER_KEY,
    assign_gpus,
    child_environment,
    find_python,
    initial_weight_version,
    router_command,
    server_command,
    warms_up,
)
from megatron_laser.rollout.servers.guard import MARK

TRAINER = {
    "PATH": "/usr/bin",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "GROUP_RANK": "0",
    "ROLE_NAME": "default",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONPATH": "/trainer",
    "OMP_NUM_THREADS": "1",
    "MEGATRON_LASER_API_KEY": "secret",
    "NCCL_SOCKET_IFNAME": "eth0",
    "HOME": "/home/me",
}


@pytest.fixture
def config(tmp_path):
    def make(**rollout):
        return run_config(
            tmp_path,
            tmp_path / "model",
            rollout={"engine": "sglang", **rollout},
            policy={"importance_cap": 2.0},
        )

    return make


def command_of(config, **changes):
    settings = {
        "python": "/opt/sglang/bin/python",
        "port": 30001,
        "settings_file": Path("/run/server_1.yaml"),
        "api_key": "secret",
        "gpus": "4,5",
        "mark": "id/1",
        "environment": TRAINER,
    }
    return server_command(config, **(settings | changes))


def value(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_the_command_line_follows_from_the_run(config, tmp_path):
    command = command_of(config(sglang={"tensor": 2, "host": "10.0.0.5"}))
    arguments = command.arguments
    assert arguments[:3] == ("/opt/sglang/bin/python", "-m", "sglang.launch_server")
    assert value(arguments, "--model-path") == str(tmp_path / "model")
    assert (value(arguments, "--host"), value(arguments, "--port")) == ("10.0.0.5", "30001")
    assert (value(arguments, "--tp-size"), value(arguments, "--dtype")) == ("2", "float32")
    assert value(arguments, "--config") == "/run/server_1.yaml"
    assert "--skip-tokenizer-init" in arguments
    assert "--enable-memory-saver" not in arguments
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_colocated_servers_can_release_their_memory(config):
    assert "--enable-memory-saver" in command_of(config(weight_sync="colocated")).arguments
    on_cpu = config(weight_sync="colocated", sglang={"device": "cpu"})  # the saver is CUDA's
    assert "--enable-memory-saver" not in command_of(on_cpu, gpus=None).arguments


def test_colocated_servers_can_give_back_the_memory_of_their_graphs(config):
    variable = "SGLANG_MEMORY_SAVER_CUDA_GRAPH"
    assert command_of(config(weight_sync="colocated")).environment[variable] == "1"
    assert variable not in command_of(config()).environment


def test_a_deterministic_server_is_started_as_one_and_none_inherits_what_changes_log_probs(config):
    name = "enable-deterministic-inference"
    assert name not in command_of(config()).settings
    assert command_of(config(sglang={"deterministic": True})).settings[name] is True
    inherited = TRAINER | {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" not in command_of(config(), environment=inherited).environment


def test_a_server_neither_warms_up_nor_captures_prefills(config):
    for device in ("cuda", "cpu"):
        settings = command_of(config(sglang={"device": device}), gpus=None).settings
        assert settings["skip-server-warmup"] is True
        assert settings["cuda-graph-backend-prefill"] == "disabled"
    assert not warms_up(config().rollout.sglang)
    options = {"skip_server_warmup": False, "--cuda-graph-backend-prefill": "breakable"}
    own = config(sglang={"options": options})
    assert warms_up(own.rollout.sglang)
    assert command_of(own).settings["cuda-graph-backend-prefill"] == "breakable"


@pytest.mark.parametrize(
    ("device", "dtype", "wide"),
    [("cuda", "bfloat16", True), ("cuda", "float32", False), ("cpu", "bfloat16", False)],
)
def test_logits_of_bfloat16_weights_are_fp32_on_gpus(config, device, dtype, wide):
    run = config(sglang={"device": device})
    run = run.model_copy(update={"model": run.model.model_copy(update={"dtype": dtype})})
    assert command_of(run, gpus=None).settings.get("enable-fp32-lm-head", False) is wide


def test_nccl_has_one_setting_on_both_sides(config):
    environment = command_of(config()).environment
    assert (environment["NCCL_CUMEM_ENABLE"], environment["NCCL_NVLS_ENABLE"]) == ("0", "0")
    ours = command_of(config(), environment=TRAINER | {"NCCL_CUMEM_ENABLE": "1"}).environment
    assert (ours["NCCL_CUMEM_ENABLE"], ours["NCCL_NVLS_ENABLE"]) == ("1", "0")


def test_the_key_is_in_the_settings_file_and_nowhere_else(config):
    command = command_of(config())
    assert command.settings["api-key"] == "secret"
    assert not any("secret" in text for text in (*command.arguments, *command.environment.values()))


def test_options_reach_the_settings_file_and_come_after_those_of_the_cpu(config):
    options = {
        "mem_fraction_static": 0.5,
        "--max-total-tokens": 99,
        "grammar-backend": None,
        "log_level": "warning",
    }
    settings = command_of(config(sglang={"device": "cpu", "options": options}), gpus=None).settings
    assert settings["mem-fraction-static"] == 0.5
    assert settings["max-total-tokens"] == 99
    assert settings["log-level"] == "warning"
    assert "grammar-backend" not in settings  # null: SGLang's own default
    assert settings["attention-backend"] == "torch_native"
    assert "attention-backend" not in command_of(config()).settings
    assert command_of(config()).settings["log-level-http"] == "warning"
    options = {"log-level-http": "info", "weight-version": "7"}
    assert command_of(config(sglang={"options": options})).settings["log-level-http"] == "info"
    assert initial_weight_version(config(sglang={"options": options}).rollout.sglang) == "7"
    assert initial_weight_version(config().rollout.sglang) == "default"


def test_a_cpu_server_sees_no_gpu_and_computes_with_one_thread(config):
    environment = command_of(config(sglang={"device": "cpu"}), gpus=None).environment
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def test_the_environment_of_a_server_has_nothing_of_the_trainers():
    child = child_environment(TRAINER, python="/opt/sglang/bin/python", mark="id/1")
    kept = {name for name in TRAINER if name in child}
    assert kept == {"PATH", "HOME", "NCCL_SOCKET_IFNAME"}
    assert child["PATH"] == "/opt/sglang/bin:/usr/bin"
    assert (child[MARK], child["SPT_NOENV"], child["PYTHONSAFEPATH"]) == ("id/1", "1", "1")
    assert child["SGLANG_TIMEOUT_KEEP_ALIVE"] == "120"  # unless the user says otherwise
    named = child_environment({"SGLANG_TIMEOUT_KEEP_ALIVE": "60"}, python="python", mark="id/1")
    assert named["SGLANG_TIMEOUT_KEEP_ALIVE"] == "60"


def test_the_libraries_of_the_trainers_torch_are_out_of_a_servers_way():
    paths = "/usr/local/cuda/lib64:/usr/local/lib/python3.12/dist-packages/torch/lib:/opt/ucx/lib"
    child = child_environment({"LD_LIBRARY_PATH": paths}, python="python", mark="id/1")
    assert child["LD_LIBRARY_PATH"] == "/usr/local/cuda/lib64:/opt/ucx/lib"


def test_the_router_gets_its_key_in_the_environment(config):
    command = router_command(
        config(),
        python="python",
        port=30000,
        metrics_port=29001,
        workers=["http://10.0.0.5:30001", "http://10.0.0.5:30002"],
        api_key="secret",
        mark="id/router",
        environment=TRAINER,
    )
    assert command.environment[ROUTER_KEY] == "secret"
    assert not any("secret" in text for text in command.arguments)
    assert value(command.arguments, "--policy") == "cache_aware"
    # /health is 503 while a server is paused for a weight update
    assert value(command.arguments, "--health-check-endpoint") == "/model_info"


@pytest.mark.parametrize(
    ("servers", "tensor", "visible", "count", "expected"),
    [
        (2, 2, None, 8, ["0,1", "2,3"]),
        (2, 2, "4,5,6,7", None, ["4,5", "6,7"]),
        (1, 1, "GPU-aa", None, ["GPU-aa"]),
        (4, 1, None, None, ["0", "1", "2", "3"]),  # nobody knows how many there are
    ],
)
def test_each_server_gets_gpus_of_its_own(servers, tensor, visible, count, expected):
    assert assign_gpus(servers, tensor, visible, count) == expected


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", None), (None, 3), ("", 8)])
def test_too_few_gpus_are_an_error_with_the_arithmetic(visible, count):
    with pytest.raises(ConfigError, match=r"servers 2 x rollout\.sglang\.tensor 2 = 4 GPUs"):
        assign_gpus(2, 2, visible, count)


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """(a working directory with .venv-sglang, its interpreter); SGLang is not beside the trainer."""
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    local = tmp_path / ".venv-sglang" / "bin" / "python"
    write_executable(local, "exit 0")
    return tmp_path, str(local)


def test_an_environment_of_its_own_is_found_where_sglang_is_not_beside_the_trainer(config, environments):
    folder, local = environments
    for device in ("cuda", "cpu"):
        assert find_python(config(sglang={"device": device}).rollout.sglang, folder) == local
    assert find_python(config().rollout.sglang, folder / "elsewhere").endswith("/python")


def test_sglang_beside_the_trainer_comes_first_on_gpus_and_its_cpu_build_on_cpus(
    config, environments, monkeypatch
):
    folder, local = environments
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "sglang" else None)
    assert find_python(config().rollout.sglang, folder) == sys.executable
    on_cpu = config(sglang={"device": "cpu"}).rollout.sglang
    assert find_python(on_cpu, folder) == local
    assert find_python(on_cpu, folder / "elsewhere") == sys.executable


def test_a_variable_names_the_interpreter_for_every_run_and_a_setting_for_one(
    config, environments, monkeypatch
):
    folder, local = environments
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert find_python(config().rollout.sglang, folder) == sys.executable
    assert find_python(config(sglang={"python": local}).rollout.sglang, folder) == local
    monkeypatch.setenv(PYTHON_VARIABLE, "/none/python")
    with pytest.raises(ConfigError, match=f"{PYTHON_VARIABLE}: /none/python is not a program"):
        find_python(config().rollout.sglang, folder)


def test_a_missing_interpreter_is_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.python: /none/python is not a program"):
        find_python(config(sglang={"python": "/none/python"}).rollout.sglang, tmp_path)

"""From a run's settings to the command line, settings file and environment of one server. Pure."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.model_folder.quantized import BLOCK_CONFIG
from megatron_laser.config.schema.rollout import SglangConfig
from megatron_laser.config.server_options import server_option
from megatron_laser.rollout.nccl import server_settings
from megatron_laser.rollout.servers.guard import MARK
from megatron_laser.rollout.sglang_api import MODEL_INFO, NO_WEIGHTS

ROUTER_KEY = "MEGATRON_LASER_ROUTER_KEY"
PYTHON_VARIABLE = "MEGATRON_LASER_SGLANG_PYTHON"
LOCAL_PYTHON = Path(".venv-sglang/bin/python")  # what tools/setup_sglang_cpu.sh makes

# For every server; rollout.sglang.options comes after it.
BASE_OPTIONS: dict[str, Any] = {
    "log-level-http": "warning",  # one line per request would bury what matters
    # The warm-up is a request of the server to itself, and ends it when a pause for weights keeps it waiting.
    "skip-server-warmup": True,
    # SGLang's default on GPUs, "breakable", keeps weak references to inputs that may be gone at replay (sglang issue
    # 37606: other greedy output, illegal memory accesses). Prompts are prefilled without a graph.
    "cuda-graph-backend-prefill": "disabled",
}

# The product that makes the logits of bfloat16 weights can give them in fp32: rounded, they differ from the trainer's
# by up to 0.1 nat.
BFLOAT16_CUDA_OPTIONS: dict[str, Any] = {"enable-fp32-lm-head": True}

# The configuration of a folder of FP8 weights over one of plain weights, whose values then mean nothing, since scales
# are missing: the first weight sync brings codes and scales. SGLang's dummy weights would be finite, but would also
# fill the scales of the key/value cache (`layers/quantization/kv_cache.py`), which no sync mends.
FP8_OPTIONS: dict[str, Any] = {
    "quantization": BLOCK_CONFIG["quant_method"],
    "json-model-override-args": json.dumps({"quantization_config": BLOCK_CONFIG}),
    "weight-version": NO_WEIGHTS,
}

# What a small model on a CPU needs beside that.
CPU_OPTIONS: dict[str, Any] = {
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": True,
    "cuda-graph-backend-decode": "disabled",
    "max-total-tokens": 16384,
    "mem-fraction-static": 0.1,
    "sleep-on-idle": True,  # else an idle scheduler keeps a core busy
}

# torchrun's description of the trainer's job, and settings that are right for the trainer's process alone. The
# cluster's NCCL_* (interfaces, adapters) stay: weight sync needs them on both sides.
_DROPPED = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PYTORCH_CUDA_ALLOC_CONF",  # expandable segments cannot be shared by CUDA IPC
        "PYTORCH_ALLOC_CONF",
        "CUDA_DEVICE_MAX_CONNECTIONS",  # 1 for Megatron; SGLang wants its own
        "SGLANG_RETURN_ORIGINAL_LOGPROB",  # log-probs are of logits / temperature, as the trainer's are
        "NCCL_ASYNC_ERROR_HANDLING",
        "NCCL_BLOCKING_WAIT",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "PYTHONPATH",  # the trainer's packages
        "PYTHONHOME",
        "PYTHONSTARTUP",
        "PYTHONDONTWRITEBYTECODE",  # a server imports thousands of modules at every start
        "PYTHONWARNINGS",
        "VIRTUAL_ENV",
    }
)
_DROPPED_PREFIXES = ("TORCHELASTIC_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "NVTE_", "MEGATRON_LASER_")

_ROUTER_SCRIPT = (  # the key comes in the environment: arguments are visible to every user of the machine
    f"import os, runpy, sys; key = os.environ.pop({ROUTER_KEY!r}, ''); sys.argv += ['--api-key', key] if key else []; "
    "runpy.run_module('sglang_router.launch_router', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start one process.

    Attributes:
        arguments: the command line; nothing secret is in it.
        environment: the whole environment of the process.
        settings: contents of the file behind `--config`, for the owner's eyes only; empty for a router.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    settings: dict[str, Any]


def server_command(
    config: RunConfig,
    *,
    python: str,
    port: int,
    settings_file: Path,
    api_key: str | None,
    gpus: str | None,
    mark: str,
    environment: Mapping[str, str],
) -> ServerCommand:
    """The command of one server.

    Args:
        config: the run; `model` and `rollout.sglang` count.
        python: interpreter of SGLang's environment.
        port: a free one.
        settings_file: where `settings` will be written, *.yaml.
        api_key: what the server shall ask for; None: nothing.
        gpus: its CUDA_VISIBLE_DEVICES; None leaves the variable alone.
        mark: identifies the process and its children, see `guard`.
        environment: of this process.
    """
    sglang = config.rollout.sglang
    arguments = [python, "-m", "sglang.launch_server", "--config", str(settings_file)]
    arguments += ["--model-path", str(config.model.path), "--dtype", config.model.dtype]
    arguments += ["--host", sglang.host, "--port", str(port), "--device", sglang.device]
    arguments += ["--tp-size", str(sglang.tensor), "--skip-tokenizer-init"]
    colocated = config.rollout.weight_sync == "colocated" and sglang.device == "cuda"
    if colocated:
        arguments.append("--enable-memory-saver")
    settings = BASE_OPTIONS | (CPU_OPTIONS if sglang.device == "cpu" else {})
    if sglang.device == "cuda" and config.model.dtype == "bfloat16":
        settings |= BFLOAT16_CUDA_OPTIONS
    if sglang.quantization is not None:
        settings |= FP8_OPTIONS
    if sglang.deterministic:
        settings |= {"enable-deterministic-inference": True}
    if config.moe.routing_replay:
        settings |= {"enable-return-routed-experts": True}
    for name, value in sglang.options.items():
        settings[name.lstrip("-").replace("_", "-")] = value
    settings = {name: value for name, value in settings.items() if value is not None}
    if api_key is not None:
        settings["api-key"] = api_key
    child = child_environment(environment, python=python, mark=mark)
    # What is published is then what it has, whatever SGLang's defaults become.
    child |= server_settings(child, settings)
    if sglang.device == "cpu":
        # Threads that spin beside each other on few cores slow everything down; the scheduler computes alone.
        child |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif gpus is not None:
        child["CUDA_VISIBLE_DEVICES"] = gpus
    if colocated:  # the memory of decode graphs can be given back too
        child["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
    return ServerCommand(tuple(arguments), child, settings)


def initial_weight_version(sglang: SglangConfig) -> str:
    """What a server calls the weights of the model folder."""
    if sglang.quantization is not None:
        return NO_WEIGHTS
    return str(server_option(sglang.options, "weight_version", "default"))  # SGLang's


def warms_up(sglang: SglangConfig) -> bool:
    """Whether a server sends itself requests once its port is open, which must not be paused before they are done."""
    return not server_option(sglang.options, "skip_server_warmup", True)


def router_command(
    config: RunConfig,
    *,
    python: str,
    port: int,
    metrics_port: int,
    workers: list[str],
    api_key: str | None,
    mark: str,
    environment: Mapping[str, str],
) -> ServerCommand:
    """The command of sglang-router in front of `workers` (addresses)."""
    sglang = config.rollout.sglang
    arguments = [python, "-c", _ROUTER_SCRIPT, "--host", sglang.host, "--port", str(port)]
    arguments += ["--worker-urls", *workers, "--policy", "cache_aware"]
    # SGLang's own health check answers 503 while a server is paused for a weight update; this goes on answering.
    arguments += ["--health-check-endpoint", MODEL_INFO, "--health-check-interval-secs", "5"]
    arguments += ["--health-failure-threshold", "2", "--health-success-threshold", "1"]
    arguments += ["--health-check-timeout-secs", "20"]
    # Repeating is the run's decision: it knows what was received already.
    arguments += ["--disable-retries", "--disable-circuit-breaker"]
    arguments += ["--request-timeout-secs", str(int(config.rollout.deadline) + 1)]
    arguments += ["--worker-startup-timeout-secs", str(int(sglang.start_deadline) + 1)]
    arguments += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    arguments += ["--log-level", "warn"]
    child = child_environment(environment, python=python, mark=mark)
    if api_key is not None:
        child[ROUTER_KEY] = api_key
    return ServerCommand(tuple(arguments), child, {})


def child_environment(environment: Mapping[str, str], *, python: str, mark: str) -> dict[str, str]:
    """`environment` without what belongs to the trainer, and with what every server process gets."""
    child = {
        name: value
        for name, value in environment.items()
        if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)
    }
    libraries = child.get("LD_LIBRARY_PATH")
    if libraries is not None:  # containers put the libraries of their own torch there
        kept = [path for path in libraries.split(os.pathsep) if "-packages/" not in path]
        child["LD_LIBRARY_PATH"] = os.pathsep.join(kept)
    tools = os.path.dirname(python)  # ninja and other programs that SGLang compiles kernels with
    if tools:
        child["PATH"] = os.pathsep.join(filter(None, [tools, child.get("PATH", "")]))
    child |= {
        MARK: mark,
        "SPT_NOENV": "1",  # process titles must not overwrite the mark
        "PYTHONSAFEPATH": "1",  # nor the working directory's modules shadow SGLang's
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": environment.get("HF_HUB_OFFLINE") or "1",  # model.path is a folder
        # Seconds; SGLang's 5 end connections that a busy trainer is about to use again.
        "SGLANG_TIMEOUT_KEEP_ALIVE": environment.get("SGLANG_TIMEOUT_KEEP_ALIVE") or "120",
    }
    return child


def find_python(sglang: SglangConfig, working_directory: Path) -> str:
    """The interpreter of SGLang's environment, absolute; see `rollout.sglang.python`.

    Raises:
        ConfigError: it is not there.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    wanted = sglang.python or named or _found_python(sglang.device, working_directory / LOCAL_PYTHON)
    found = shutil.which(wanted)
    if found is None:
        setting = PYTHON_VARIABLE if named and not sglang.python else "rollout.sglang.python"
        raise ConfigError(
            [
                f"{setting}: {wanted} is not a program; expected the interpreter of an environment with "
                "SGLang (on CPUs tools/setup_sglang_cpu.sh makes one)"
            ]
        )
    return os.path.abspath(found)  # not resolved: a virtual environment's python is a link


def _found_python(device: str, local: Path) -> str:
    own = sys.executable if importlib.util.find_spec("sglang") is not None else None  # found, never imported
    made = str(local) if local.exists() else None
    return (made or own if device == "cpu" else own or made) or "python"


def assign_gpus(servers: int, tensor: int, visible: str | None, count: int | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each server: `tensor` devices each, in order.

    Args:
        visible: CUDA_VISIBLE_DEVICES of this process; None: not set.
        count: GPUs of the node; None: unknown. Only asked where `visible` is None.

    Raises:
        ConfigError: there are too few.
    """
    needed = servers * tensor
    if visible is not None:
        devices = [name.strip() for name in visible.split(",") if name.strip()]
    else:
        devices = [str(index) for index in range(needed if count is None else count)]
    if len(devices) < needed:
        source = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "nvidia-smi"
        raise ConfigError(
            [
                f"rollout.sglang.servers {servers} x rollout.sglang.tensor {tensor} = {needed} GPUs, but {source} "
                f"shows {len(devices)}; lower one of the two, or set rollout.sglang.device: cpu for a small model"
            ]
        )
    return [",".join(devices[index * tensor : (index + 1) * tensor]) for index in range(servers)]

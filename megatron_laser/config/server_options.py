"""Options of sglang.launch_server that a run must not give: they follow from its own settings, or cannot work in it.

Names and aliases are those of SGLang 0.5.23 (`ServerArgs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_laser.config.schema.rollout import RolloutConfig

# Given twice, one of the two would be ignored.
OWN_OPTIONS = {
    "model_path": "model.path",
    "model": "model.path",
    "host": "rollout.sglang.host",
    "port": "rollout.sglang.port",
    "tp_size": "rollout.sglang.tensor",
    "tensor_parallel_size": "rollout.sglang.tensor",
    "dtype": "model.dtype",
    "device": "rollout.sglang.device",
    "api_key": "rollout.sglang.api_key_env",
    "skip_tokenizer_init": "the client, which sends and takes token ids",
    "base_gpu_id": "the server's place on its node",
    "gpu_id_step": "the server's place on its node",
    "enable_memory_saver": "rollout.weight_sync",
    "enable_deterministic_inference": "rollout.sglang.deterministic",
    "enable_return_routed_experts": "moe.routing_replay",
    "quantization": "rollout.sglang.quantization",
    "enable_nccl_nvls": "the variable NCCL_NVLS_ENABLE, which must be the same for trainer and servers",
    "config": "these options, which go into a file of their own",
}

_DATA = (
    "SGLang takes no weight update with data parallelism inside a server; start more of them: "
    "rollout.sglang.servers"
)
_PIPELINE = (
    "a weight update numbers a server's ranks by tensor parallelism alone, and two stages would have one number; "
    "use rollout.sglang.tensor"
)
_NODES = "serve starts servers within one node; start it on each node, with rollout.sglang.servers and tensor"
_GRPC = "the run speaks HTTP to its servers"
_TLS = "the run speaks plain HTTP to its servers, on loopback or a private network"
_PHASES = "every server must answer a generation whole"

# SGLang would take them, and fail or do something else later: in the first weight update, or in every response.
UNUSABLE_OPTIONS = {
    **dict.fromkeys(("dp_size", "data_parallel_size", "attn_dp_size", "attention_data_parallel_size"), _DATA),
    **dict.fromkeys(("enable_dp_attention", "moe_dp_size", "moe_data_parallel_size", "dwdp_size"), _DATA),
    **dict.fromkeys(("pp_size", "pipeline_parallel_size"), _PIPELINE),
    **dict.fromkeys(("nnodes", "node_rank", "dist_init_addr", "nccl_init_addr"), _NODES),
    "use_ray": _NODES,
    "uno_lora_path": "a draft model is not updated with the weights, or is given the policy's own",
    "tokenizer_worker_num": "a pause and a weight update must reach every request, and several workers share them out",
    **dict.fromkeys(("grpc_mode", "smg_grpc_mode"), _GRPC),
    **dict.fromkeys(("disaggregation_mode", "encoder_only", "language_only", "is_embedding"), _PHASES),
    "admin_api_key": "the run has one key for everything: rollout.sglang.api_key_env",
    "preferred_sampling_params": "they change what is sampled behind every request, while log-probs stay those of the "
    "whole distribution",
    "weight_cache_mode": "weights that servers share cannot be updated",
    "enable_symm_mem": "it sets NCCL_CUMEM_ENABLE in the server, which must be the same for trainer and servers",
    "delete_ckpt_after_loading": "it deletes model.path, which the run and every restarted server read",
    "checkpoint_engine_wait_weights_before_ready": "the run sends weights to servers that answer already",
}
# Of FP8 servers: they decide how weights are held, and tell who has none yet.
_OWN_WITH_FP8 = ("json_model_override_args", "load_format", "weight_version")
_FRACTION = "mem_fraction_static"

# Routers' choices are noted by the place of a token's keys and values in the GPU's cache, and do not move with them.
_MOVES_CACHE = ("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "enable_hisparse")
# Their kernels choose the experts themselves, and what is noted stays zero.
UNNOTED_BACKENDS = ("triton_kernel", "flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4")
_UNUSABLE_PREFIXES = {
    "speculative_": UNUSABLE_OPTIONS["uno_lora_path"],
    "ssl_": _TLS,
}


def option_problems(rollout: RolloutConfig) -> list[str]:
    """What is wrong with `rollout.sglang.options`; one line each."""
    problems = []
    for name, value in rollout.sglang.options.items():
        key = f"rollout.sglang.options.{name}"
        normal = _normal(name)
        if normal in OWN_OPTIONS:
            problems.append(f"{key}: follows from {OWN_OPTIONS[normal]}; remove it")
        elif rollout.sglang.quantization and normal in _OWN_WITH_FP8:
            problems.append(f"{key}: follows from rollout.sglang.quantization; remove it")
        elif rollout.sglang.quantization and normal == "skip_server_warmup" and not value:
            problems.append(
                f"{key}: {value}: with rollout.sglang.quantization a server has no weights before the run has sent "
                "them, and a warm-up would compute with none; remove it"
            )
        elif value is None or value is False:
            continue  # not given to the server
        elif reason := _unusable(normal):
            problems.append(f"{key}: cannot be used: {reason}; remove it")
        elif whole := _abbreviated(normal):
            problems.append(f"{key}: SGLang would read it as {whole}, which a run cannot give; remove it")
        elif not isinstance(value, str | int | float | bool | list):
            problems.append(f"{key}: expected a value or a list of values, got {value!r}")
        elif normal == _FRACTION and not _is_fraction(value):
            problems.append(f"{key}: expected a number between 0 and 1, got {value!r}")
        elif rollout.weight_sync == "colocated" and _captures_prefill(normal, value):
            problems.append(
                f"{key}: {value} with rollout.weight_sync: colocated: the memory of these CUDA graphs cannot be given "
                "back while the trainer has the GPU; remove it"
            )
    return problems


def replay_problems(options: Mapping[str, Any], *, prefix: str) -> list[str]:
    """Options with which servers report wrong experts, or none, in silence: what `moe.routing_replay` cannot have.

    Args:
        options: those to give a server, or all that one says it has.
        prefix: what stands before an option's name in a line.
    """
    problems = []
    for name, value in options.items():
        key, normal = f"{prefix}{name}", _normal(name)
        if normal in _MOVES_CACHE and value is not None and value is not False:
            problems.append(
                f"{key}: with moe.routing_replay a server would report other tokens' experts, since they do not move "
                "with a cache that leaves the GPU; remove it"
            )
        elif normal == "chunked_prefill_size" and isinstance(value, int) and value <= 0:
            problems.append(
                f"{key}: {value} lets a server note fewer tokens' experts than it feeds at once, which "
                "moe.routing_replay needs; use a positive number"
            )
        elif normal == "moe_runner_backend" and value in UNNOTED_BACKENDS:
            problems.append(
                f"{key}: {value} does not note which experts it chooses, which moe.routing_replay needs; use triton"
            )
    return problems


def server_option(options: Mapping[str, Any], wanted: str, default: Any) -> Any:
    """The value of `rollout.sglang.options` under `wanted` ("weight_version"), however its name is written there."""
    for name, value in options.items():
        if _normal(name) == wanted:
            return value
    return default


def _normal(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1


def _unusable(normal: str) -> str | None:
    by_prefix = (reason for prefix, reason in _UNUSABLE_PREFIXES.items() if normal.startswith(prefix))
    return UNUSABLE_OPTIONS.get(normal) or next(by_prefix, None)


def _abbreviated(normal: str) -> str | None:
    """The refused option that argparse would take `normal` for; None: none."""
    refused = (*OWN_OPTIONS, *UNUSABLE_OPTIONS, *_UNUSABLE_PREFIXES)
    return next((name for name in refused if len(normal) > 1 and name.startswith(normal)), None)


def _captures_prefill(normal: str, value: Any) -> bool:
    return normal == "cuda_graph_backend_prefill" and value != "disabled"

"""What settings that save memory need of this machine and of what is installed, found before weights are read."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_laser.config.derived import recomputed_of_experts
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import ConfigError
from megatron_laser.logprob_memory import GIB
from megatron_laser.model import platform
from megatron_laser.model.host_memory import require_pinned_memory
from megatron_laser.model.transformer_engine import Layers, fp8_problems, use_transformer_engine

_CGROUP = Path("/sys/fs/cgroup")


def knows_shared_prompts(layers: Layers) -> bool:
    """Whether attention and rotary embedding here are those that take `PackedMicroBatch.parents`: torch's, on a CPU."""
    return not (platform.has_cuda() or use_transformer_engine(layers))


def memory_setting_problems(config: RunConfig) -> list[str]:
    """One line for each setting that cannot be had here.

    Raises ConfigError where Transformer Engine is wanted and cannot be used.
    """
    model, settings, problems = config.model, config.optimizer, []
    if not use_transformer_engine(model.layers):
        where = "and layers are of torch here (model.layers)"
        if settings.moments_dtype != "float32":
            problems.append(
                f"optimizer.moments_dtype: {settings.moments_dtype} is for Transformer Engine's optimizer, {where}; "
                "leave it float32"
            )
        if own := recomputed_of_experts(model):
            problems.append(
                f"model.recompute: {' and '.join(own)} can be recomputed in Transformer Engine's layers only, {where}; "
                "use mlp, full or none"
            )
    problems += fp8_problems(model.fp8, model.layers)
    if config.batching.share_prompts and not knows_shared_prompts(model.layers):
        problems.append(
            "batching.share_prompts: true is for layers of torch on a CPU, and kernels on GPUs know no shared prompts; "
            "leave it null or set it to false"
        )
    if platform.has_cuda():
        for setting, wanted in (
            ("model.offload_activations", model.offload_activations),
            ("optimizer.offload", settings.offload),
        ):
            try:
                if wanted:
                    require_pinned_memory(f"{setting}: true")
            except ConfigError as error:
                problems += error.problems
    return problems


def host_memory_problems(needed: int, ranks: int, settings: str) -> list[str]:
    """One line where `ranks` of this node need more host memory than it has left; else nothing.

    Args:
        needed: page-locked bytes of each rank. settings: what asks for it.
    """
    available = available_host_bytes()
    if available is None or needed * ranks <= available:
        return []
    return [
        f"{settings}: each rank needs {needed / GIB:,.2f} GiB of page-locked host memory, {ranks} of them on this node "
        f"{needed * ranks / GIB:,.2f} GiB, and {available / GIB:,.2f} GiB are available; shard over more ranks "
        "(optimizer.distributed), lower batching.tokens_per_micro_batch, or turn one of them off"
    ]


def available_host_bytes() -> int | None:
    """What this process could still allocate: the machine's, or what its container (cgroup 2) leaves. None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError):
        return None
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        # Of what is used, files that were read or written can be dropped.
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            used -= int(size) if name in ("active_file", "inactive_file") else 0
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass
    return available


def ranks_on_this_node() -> int:
    """As the launcher says; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

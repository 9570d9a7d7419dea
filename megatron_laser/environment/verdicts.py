"""What two environments mean for a run, from their facts alone: differences, weight-sync kinds, variables."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_laser.rollout.nccl import server_settings, trainer_settings
from megatron_laser.weight_sync.feasibility import SyncSide, sync_feasibility

ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
SHOWN = (
    *("NVTE_", "NCCL_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS"),
)
_COMPARED = ("python", "torch", "cuda", "nccl", "triton", "transformers", "numpy")


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Name -> what the servers have instead, of what both sides have and should share."""
    return {
        name: f"{ours.get(name, 'none')} in the trainer, {theirs.get(name, 'none')} in the servers"
        for name in _COMPARED
        if ours.get(name, "none").split(" ")[0] != theirs.get(name, "none").split(" ")[0]
    }


def weight_syncs(
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    environment: Mapping[str, str],
    python: str,
    *,
    gpus: bool,
) -> dict[str, str]:
    """Each `rollout.weight_sync` -> "can work", or why not.

    Args:
        environment: of the trainer's processes, and of `serve`.
        python: the servers' interpreter, for messages.
        gpus: the machine has some; without, both sides compute on CPUs.
    """
    trainer = SyncSide(_version(ours, "torch"), _nccl(ours, gpus), trainer_settings(environment))
    torch = _version(theirs, "torch") if _version(theirs, "sglang") else None
    servers = SyncSide(torch, _nccl(theirs, gpus), server_settings(environment, {}), python)
    found = sync_feasibility(trainer, servers, environment)
    if "error" in theirs:
        found = dict.fromkeys(found, theirs["error"])
    return {kind: "can work" if why is None else f"cannot work: {why}" for kind, why in found.items()}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those set variables that change what NCCL, Transformer Engine and the allocator do, with a word where one may
    not be set."""
    found = {}
    for name in sorted(environment):
        if name.startswith(SHOWN):
            found[name] = environment[name]
            if name in ATTENTION:
                found[name] += "  (unset it: model.attention sets it, and another value stops the trainer)"
    return found


def _version(facts: Mapping[str, str], package: str) -> str | None:
    value = facts.get(package, "not installed")
    return None if value.startswith("not installed") or "fails to import" in value else value


def _nccl(facts: Mapping[str, str], gpus: bool) -> str | None:
    value = facts.get("nccl", "unknown")
    return value if gpus and not value.startswith("unknown") else None

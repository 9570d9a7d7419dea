"""What a dry run says about rollouts: who generates, on how many GPUs, how weights get there, how old they may be."""

from __future__ import annotations

from megatron_laser.config.checks.rollout import off_policy_reason
from megatron_laser.config.schema.rollout import RolloutConfig
from megatron_laser.config.schema.root import RunConfig


def rollout_features(config: RunConfig) -> list[tuple[str, bool, str]]:
    """(name, whether it is on, detail) of each line."""
    rollout = config.rollout
    if rollout.engine == "in_process":
        detail = f"rank 0 generates, up to {rollout.max_batch_size} sequences at once, from its own copy of the weights"
        return [("rollout", True, f"in_process: {detail}")]
    reason = off_policy_reason(rollout)
    return [
        ("rollout", True, f"sglang: {_servers(rollout)}"),
        ("weight sync", True, _sync(rollout)),
        (
            "off-policy rollout",
            reason is not None,
            f"{reason}; tokens are at most {rollout.max_staleness} steps old"
            if reason is not None
            else "none: every response comes from the weights that are trained on it",
        ),
    ]


def _servers(rollout: RolloutConfig) -> str:
    sglang = rollout.sglang
    if sglang.urls is not None:
        router = ", generation through the router" if sglang.router_url is not None else ""
        return f"{_count(len(sglang.urls), 'server')} at the addresses of rollout.sglang.urls{router}"
    if sglang.device == "cpu":
        size = f"{_count(sglang.servers, 'server')} on the CPU"
    else:
        size = (
            f"{_count(sglang.servers, 'server')} x {_count(sglang.tensor, 'GPU')} = "
            f"{_count(sglang.servers * sglang.tensor, 'GPU')}"
        )
    router = ", behind a router" if sglang.router else ""
    if sglang.endpoints is None:
        return f"{size} on rank 0's node, started by the run{router}"
    return (
        f"{size} on each node that runs `megatron-laser serve`{router}; found in {sglang.endpoints}; goes on with "
        f"{rollout.min_servers} or more"
    )


def _sync(rollout: RolloutConfig) -> str:
    if rollout.weight_sync == "disk":
        return f"disk: a folder in {rollout.sync_folder or 'run.output_dir/weights'}, which servers must see"
    buckets = f"buckets of {rollout.sync_bucket_mib:,} MiB, two of them on rank 0"
    if rollout.weight_sync == "colocated":
        return (
            f"colocated: trainer and servers take turns on the same GPUs, not proven on GPUs yet; {buckets}"
        )
    return f"distributed: broadcast from rank 0, {buckets}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

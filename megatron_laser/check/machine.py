"""What the run needs of this machine: room on its disks, and an environment for servers."""

from __future__ import annotations

from megatron_laser.check.disk import disk_findings
from megatron_laser.check.ledger import Ledger
from megatron_laser.config import RunConfig
from megatron_laser.findings import Finding
from megatron_laser.rollout.serving.start_checks import check_start
from megatron_laser.weight_sync.feasibility import check_servers

GROUP = "Machine"


def look_at_servers(config: RunConfig, ledger: Ledger) -> None:
    """Whether servers can be started and given weights; asks their interpreter, which may take seconds."""
    with ledger.topic(GROUP, "servers"):
        check_start(config)
        check_servers(config)
        ledger.add(GROUP, [Finding("servers", "ok", _servers(config))])


def look_at_disks(config: RunConfig, ledger: Ledger) -> None:
    """Whether what the run writes has room."""
    with ledger.topic(GROUP, "disk space"):
        ledger.add(GROUP, disk_findings(config))


def _servers(config: RunConfig) -> str:
    rollout, sglang = config.rollout, config.rollout.sglang
    if rollout.engine == "in_process":
        return "none are needed (rollout.engine is in_process)"
    if sglang.urls is not None:
        return f"{len(sglang.urls)} by address; they say what they are at the first contact"
    if sglang.endpoints is not None:
        return f"those that serve publishes in {sglang.endpoints}"
    return (
        f"{sglang.servers} of {sglang.tensor} {'GPU' if sglang.tensor == 1 else 'GPUs'} each can be started here"
        if (sglang.device == "cuda")
        else f"{sglang.servers} on CPUs can be started here"
    )

"""The run as its own configuration lays it out, on a given number of GPUs."""

from __future__ import annotations

from dataclasses import replace

from megatron_laser.config.plan.resolve import Plan, another_layout, resolve_plan
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import ConfigError
from megatron_laser.planner.layouts import Candidate, Shape, Split
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.run_file import changed

_PLAIN = {
    "parallel.tensor": 1,
    "parallel.sequence": False,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.stage_layers": "even",
    "parallel.context": 1,
    "parallel.expert": 1,
    "parallel.expert_tensor": 1,
}


def base_plan(config: RunConfig, machine: Machine) -> Plan:
    """What all layouts of a run have in common, with `config` itself, whose own layout may be an impossible one.

    Raises:
        ConfigError: what no other layout would mend.
    """
    try:
        return resolve_plan(config, None, machine.memory_gib, machine.device)
    except ConfigError as error:
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        colocated = config.rollout.weight_sync == "colocated" and config.rollout.engine == "sglang"
        plain = changed(
            config,
            {
                **_PLAIN,
                "batching.tokens_per_micro_batch": max(longest, config.batching.tokens_per_micro_batch),
                **({"rollout.weight_sync": "distributed"} if colocated else {}),
            },
        )
        try:
            return replace(resolve_plan(plain, None, machine.memory_gib, machine.device), config=config)
        except ConfigError:
            raise error from None


def as_configured(base: Plan, gpus: int, machine: Machine, server_gpus: int | None = None) -> Candidate:
    """The layout of `base.config` on `gpus` GPUs.

    Args:
        server_gpus: of them, those that only generate; None: as many as `rollout.sglang` says on one node, and on
            several nodes half of the nodes, or what is nearest to it that the trainer's layout allows.

    Raises:
        ConfigError: the layout does not fit so many GPUs.
    """
    config = base.config
    rollout, node = config.rollout, machine.gpus_per_node
    parallel = config.parallel
    shape = Shape(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline,
        parallel.context,
        parallel.expert,
        parallel.expert_tensor,
    )
    if rollout.engine != "sglang" or rollout.weight_sync == "colocated":
        if server_gpus:
            what = "colocated rollouts" if rollout.engine == "sglang" else f"rollout.engine {rollout.engine}"
            raise ConfigError([f"--server-gpus {server_gpus}: {what} has no GPUs of its own"])
        engine = "colocated" if rollout.engine == "sglang" else rollout.engine
        return Candidate(another_layout(base, config, gpus), Split(gpus, 0, engine), shape)
    tensor = rollout.sglang.tensor
    if server_gpus is not None:
        wanted = [server_gpus]
    elif gpus <= node:
        wanted = [(len(rollout.sglang.urls) if rollout.sglang.urls else rollout.sglang.servers) * tensor]
    else:
        half = gpus // node // 2 * node
        wanted = sorted(range(node, gpus, node), key=lambda count: (abs(count - half), count))
    problems: list[str] = []
    for count in wanted:
        if count >= gpus:
            problems.append(
                f"{count} GPUs for servers, of {gpus} in all: expected at least one GPU left to train; give more "
                "--gpus, or fewer with --server-gpus or rollout.sglang.servers"
            )
            continue
        if count % tensor:
            problems.append(
                f"{count} GPUs for servers of {tensor} (rollout.sglang.tensor): expected a multiple of {tensor}; say "
                "how many with --server-gpus"
            )
            continue
        try:
            plan = another_layout(base, config, gpus - count)
        except ConfigError as error:
            problems += error.problems
            continue
        return Candidate(plan, Split(gpus - count, count, "apart"), shape)
    raise ConfigError(list(dict.fromkeys(problems))[:3])

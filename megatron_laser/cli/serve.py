"""The command `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides, SetFiles

if TYPE_CHECKING:
    from megatron_laser.config import RunConfig


def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    set_files: SetFiles = None,
    endpoints: Annotated[
        Path | None,
        typer.Option(
            help="File to publish the servers in, or a folder in which each node writes HOSTNAME.json; by default "
            "rollout.sglang.endpoints."
        ),
    ] = None,
    outlive_parent: Annotated[
        bool,
        typer.Option(
            "--outlive-parent",
            help="Go on when the process that started this one ends (with nohup or a terminal that you close).",
        ),
    ] = False,
    wait: Annotated[
        int | None,
        typer.Option(
            metavar="NODES",
            min=1,
            help="Start nothing: wait until the servers of so many nodes answer, then end. For scripts that start "
            "trainer and servers together.",
        ),
    ] = None,
) -> None:
    """Start this node's SGLang servers and keep them running.

    Of the YAML file `model` and `rollout.sglang` count; settings can be overridden: rollout.sglang.servers=4.

    One node, trainer and servers on GPUs of their own; the run finds the servers by the same YAML:

        CUDA_VISIBLE_DEVICES=4,5,6,7 megatron-laser serve RUN.yaml

        CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc-per-node 4 -m megatron_laser train RUN.yaml

    Several rollout nodes: the same command on each, with one shared folder and the node's own private address:

        megatron-laser serve RUN.yaml rollout.sglang.endpoints=/shared/servers rollout.sglang.host=10.0.0.7

        megatron-laser serve RUN.yaml rollout.sglang.endpoints=/shared/servers --wait 4    (then train)

    Servers that die or hang are started again; each has a log beside the endpoints file. Everything ends with this
    command: Ctrl-C, SIGTERM, even kill -9. docs/rollout.md has topologies, sizes, and what to do when it hangs.
    """
    from megatron_laser.config import load_config
    from megatron_laser.rollout.servers.fleet_plan import endpoints_file
    from megatron_laser.rollout.servers.launcher import wait_for_servers

    settings = list(overrides or [])
    if wait is not None and endpoints is not None:
        settings.append(f"rollout.sglang.endpoints={json.dumps(str(endpoints.resolve()))}")
    loaded = load_config(config, settings, set_files or [])
    if wait is not None:
        wait_for_servers(loaded, wait, _say)
        return
    _serve(loaded, endpoints_file(loaded, endpoints), outlive_parent)


def _serve(loaded: RunConfig, file: Path, outlive_parent: bool) -> None:
    from megatron_laser.rollout.servers.fleet_plan import claim, describe, plan_fleet
    from megatron_laser.rollout.servers.supervisor import Supervisor

    with claim(file) as lock:
        plan = plan_fleet(loaded, file)
        for remark in plan.remarks:
            _say(remark)
        _say(describe(plan))
        asyncio.run(Supervisor(plan, _say).run(lock=lock.fileno(), outlive_parent=outlive_parent))


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it is gone; the servers still have to be ended
        print(f"{time.strftime('%H:%M:%S')} serve: {line}", flush=True)

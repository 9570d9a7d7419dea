"""The rollout engine that a configuration names, with its weight transport and, if need be, its servers."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, assert_never

import torch

from megatron_laser.config import (
    ConfigError,
    RunConfig,
    evaluation_max_new_tokens,
    longest_sequence,
    read_architecture,
)
from megatron_laser.config.derived import function_deadline
from megatron_laser.model import platform
from megatron_laser.model.platform import DTYPES
from megatron_laser.rewards import GradingPoolError
from megatron_laser.rollout.client.engine import SglangEngine, WeightTransport
from megatron_laser.rollout.client.errors import ServerError, ServersLost, WeightsNeeded
from megatron_laser.rollout.client.identify import SIZES, Expected
from megatron_laser.rollout.endings import NothingEnds
from megatron_laser.rollout.endpoints import Endpoints, EndpointsError, ServerEndpoint, read_endpoints
from megatron_laser.rollout.engine import RolloutEngine, takes_seeds
from megatron_laser.rollout.function.runner import FunctionFailed, SampleFunction
from megatron_laser.rollout.servers import ServeProcess
from megatron_laser.types import RoutingShape
from megatron_laser.weight_sync.checksums import ServerLayout
from megatron_laser.weight_sync.colocated import ColocatedTransport
from megatron_laser.weight_sync.disk import DiskTransport
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.feasibility import trainer_nccl
from megatron_laser.weight_sync.peers import Peers

logger = logging.getLogger(__name__)

_SAY_EVERY = 30.0  # seconds between two words about servers that are not ready

WorkResult = str
"""What rank 0's work came to: "" when it is done, `NEEDS_WEIGHTS`, `STOPPED` with a reason, or why the run ends."""
STOPPED: WorkResult = "stopped: "
"""What comes before the reason to stop, where a stop cut the work off."""
NEEDS_WEIGHTS: WorkResult = "needs weights"
"""Servers came back without the current weights: sync them, and do the same again."""


def open_engine(config: RunConfig) -> RolloutEngine:
    """Start or find what generates. Call on rank 0.

    Raises:
        ConfigError: endpoints that cannot be read, or a setting that this machine cannot keep.
        ServersLost, ServerMismatch: servers that do not come up, or cannot be used.
    """
    if config.rollout.engine == "in_process":
        # Only here: it imports transformers' model classes, which runs with servers do without.
        from megatron_laser.rollout.in_process import InProcessEngine

        return InProcessEngine(
            config.model.path,
            dtype=DTYPES[config.model.dtype],
            device=platform.device(),
            max_batch_size=config.rollout.max_batch_size,
            made_up=config.run.fake.weights,
        )
    rollout = config.rollout
    transport = _transport(config)
    child = _start_servers(config)
    engine: SglangEngine | None = None
    try:
        endpoints = _endpoints(config, child)
        engine = SglangEngine(
            _source(config, child),
            api_key=endpoints.api_key or os.environ.get(rollout.sglang.api_key_env),
            expected=_expected(config),
            max_concurrency_per_server=rollout.max_concurrency_per_server,
            router_url=endpoints.router_url,
            min_servers=rollout.min_servers,
            start_deadline=rollout.sglang.start_deadline,
            servers_deadline=rollout.servers_deadline,
            sync_deadline=rollout.sync_deadline,
            hang_deadline=rollout.sglang.hang_deadline,
            transport=transport,
            on_close=child.stop if child is not None else None,
        )
        if isinstance(transport, DistributedTransport):  # it would be found at the first sync, too, but later
            # Those that came up since then say who they are before they are first given weights.
            transport.peers.backend(engine.fleet.identified())
        if not takes_seeds(engine):
            logger.info(
                "run.seed and evaluation.seed do not reach what the servers sample, which were started without "
                "deterministic inference: two runs of one seed differ (rollout.sglang.deterministic)"
            )
        return engine
    except BaseException:
        if engine is not None:
            engine.close()
        elif child is not None:
            child.stop()
        raise


def await_servers(config: RunConfig, engine: RolloutEngine) -> None:
    """Wait for `rollout.min_servers` servers that can be given weights.

    Raises ServersLost after `rollout.servers_deadline` seconds.
    """
    if isinstance(engine, SglangEngine):
        seconds = config.rollout.servers_deadline
        engine.run(
            engine.fleet.wait_until_up(config.rollout.min_servers, seconds), seconds, "waiting for servers"
        )


def call_engine(phase: str, work: Callable[[], None]) -> WorkResult:
    """Do `work`, which uses the engine: "" when it is done, `NEEDS_WEIGHTS`, or why the run has to stop.

    An OSError is a reason to stop, too: a full disk, too many open files. The run is saved then.
    """
    try:
        work()
    except WeightsNeeded as error:
        logger.warning("%s: %s", phase, error)
        return NEEDS_WEIGHTS
    except (ServersLost, ServerError, TimeoutError, GradingPoolError, FunctionFailed, NothingEnds) as error:
        return f"{phase}: {error}"
    except OSError as error:
        return f"{phase}: {type(error).__name__}: {error}"
    return ""


def uses_servers(config: RunConfig) -> bool:
    """Whether servers generate: they must be given the trainer's weights before the first rollout, and may be lost."""
    return config.rollout.engine == "sglang"


def _expected(config: RunConfig) -> Expected:
    architecture = read_architecture(config.model.path)
    folder = json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8"))
    return Expected(
        architecture.vocab_size,
        model_type=folder.get("model_type"),
        dtype=config.model.dtype,
        longest=longest_sequence(config),
        sizes={name: folder[name] for name in SIZES if name in folder},
        tied=architecture.tied_embeddings,
        deterministic=config.rollout.sglang.deterministic,
        routing=config.moe.routing_replay,
        quantization=config.rollout.sglang.quantization,
    )


def _start_servers(config: RunConfig) -> ServeProcess | None:
    sglang = config.rollout.sglang
    if sglang.urls is not None or sglang.endpoints is not None:
        return None
    return ServeProcess(config, Path(config.run.output_dir) / "servers")


def _endpoints(config: RunConfig, child: ServeProcess | None) -> Endpoints:
    """What is known of the servers, once their file is there."""
    sglang = config.rollout.sglang
    if sglang.urls is not None:
        return Endpoints(tuple(ServerEndpoint(url) for url in sglang.urls), router_url=sglang.router_url)
    path = sglang.endpoints if child is None else child.endpoints
    assert path is not None
    started = time.monotonic()
    said = -_SAY_EVERY
    while True:
        if child is not None and not child.alive():
            child.wait_ready(0.0)  # says why it has ended
        try:
            found = read_endpoints(path)
            ready = sum(server.state in ("ready", "held") for server in found.servers)
            # Its own servers a run can wait for; of others it cannot know how many nodes will publish some.
            if ready and (child is None or ready == len(found.servers)):
                return found
            trouble = f"{path}: {ready} of {len(found.servers)} servers are ready"
        except EndpointsError as error:
            trouble = str(error) if child is None else f"{path} is not there yet"
        waited = time.monotonic() - started
        if waited > sglang.start_deadline:
            raise ConfigError(
                [f"{trouble}; waited rollout.sglang.start_deadline {sglang.start_deadline:g} s"]
            )
        if waited - said >= _SAY_EVERY:
            log = "" if child is None else f"; see {child.log}"
            logger.info("waiting for rollout servers since %.0f s: %s%s", waited, trouble, log)
            said = waited
        time.sleep(0.5)


def _source(config: RunConfig, child: ServeProcess | None) -> Callable[[], Sequence[ServerEndpoint]]:
    sglang = config.rollout.sglang
    if sglang.urls is not None:
        fixed = [ServerEndpoint(url) for url in sglang.urls]
        return lambda: fixed
    path = sglang.endpoints if child is None else child.endpoints
    assert path is not None
    return lambda: [server for server in read_endpoints(path).servers if server.state != "failed"]


def _transport(config: RunConfig) -> WeightTransport:
    rollout, dtype = config.rollout, DTYPES[config.model.dtype]
    quantized = rollout.sglang.quantization is not None
    layout = ServerLayout(read_architecture(config.model.path).num_attention_heads)
    if rollout.weight_sync == "disk":
        return DiskTransport(
            rollout.sync_folder or Path(config.run.output_dir) / "weights",
            source=Path(config.model.path),
            dtype=dtype,
            seconds=rollout.sync_deadline,
            always_verify=rollout.verify_sync,
            layout=layout,
            quantized=quantized,
        )
    if rollout.weight_sync == "colocated":
        return ColocatedTransport(
            dtype=dtype,
            bucket_bytes=rollout.sync_bucket_mib * 2**20,
            seconds=rollout.sync_deadline,
            always_verify=rollout.verify_sync,
            layout=layout,
            quantized=quantized,
        )
    if rollout.weight_sync != "distributed":
        assert_never(rollout.weight_sync)
    return DistributedTransport(
        peers=Peers(torch_version=torch.__version__, nccl_version=trainer_nccl()),
        dtype=dtype,
        bucket_bytes=rollout.sync_bucket_mib * 2**20,
        seconds=rollout.sync_deadline,
        address=rollout.sync_address,
        flattened=rollout.sync_flatten,
        always_verify=rollout.verify_sync,
        layout=layout,
        quantized=quantized,
        past_groups=_past_groups(config),
    )


def _past_groups(config: RunConfig) -> Path | None:
    """Beside the endpoints file, since any run with these servers may find groups of another one."""
    sglang = config.rollout.sglang
    if sglang.endpoints is not None:
        path = Path(sglang.endpoints)
        return (path if path.is_dir() else path.parent) / ".weight_groups"
    return Path(config.run.output_dir) / ".weight_groups" if sglang.urls is not None else None


def routing_shape(config: RunConfig) -> RoutingShape | None:
    """What routing replay asks of the engine; None for a dense model."""
    architecture = read_architecture(config.model.path)
    moe = architecture.moe
    return (
        None if moe is None else RoutingShape(architecture.num_layers, moe.experts_per_token, moe.num_experts)
    )


def open_function(
    config: RunConfig, tokenizer: Any, score_token_id: int | None, engine: RolloutEngine
) -> SampleFunction | None:
    """What makes the samples where the engine alone does not (`rollout.function`)."""
    if config.rollout.function is None:
        return None
    architecture = read_architecture(config.model.path)
    return SampleFunction(
        config.rollout.function,
        engine,
        options=config.rollout.function_options,
        deadline=function_deadline(config),
        tokenizer=tokenizer,
        vocab_size=architecture.vocab_size,
        longest=max(
            longest_sequence(config), config.data.max_prompt_tokens + evaluation_max_new_tokens(config)
        ),
        max_positions=architecture.max_position_embeddings,
        score_token_id=score_token_id,
    )

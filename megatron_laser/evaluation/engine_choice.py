"""The one place that opens an engine at test time: the model in this process, or servers by their URLs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_laser.config.addresses import host_and_port
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.responses import generation_batch
from megatron_laser.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Who generates and scores.

    Attributes:
        urls: of SGLang servers that hold the model; none: this process, which loads the weights.
        router_url: of a router in front of the servers in `urls`, which then takes the requests.
        api_key: that the servers ask for. Never on a command line, where other users could read it.
        dtype: float32 or bfloat16, in this process.
        max_batch_size: sequences at once in this process. max_concurrency_per_server: requests at once
            on each server.
        wait: seconds until all servers must have answered for the first time.
    """

    urls: tuple[str, ...] = ()
    router_url: str | None = None
    api_key: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_batch_size: int = 256
    max_concurrency_per_server: int = 256
    wait: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot be an engine, before anything is loaded."""
        for url in (*self.urls, *([self.router_url] if self.router_url else [])):
            try:
                host_and_port(url)
            except ValueError as error:
                raise TestTimeError(f"{url!r} is not a server's URL; {error}") from None
        if self.router_url and not self.urls:
            raise TestTimeError(
                f"--router {self.router_url} without --url: control calls and health checks go to the servers "
                "themselves; name each of them with --url"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise TestTimeError(f"dtype {self.dtype!r}: expected float32 or bfloat16")
        for name in ("max_batch_size", "max_concurrency_per_server"):
            if getattr(self, name) < 1:
                raise TestTimeError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not self.wait > 0:
            raise TestTimeError(f"wait is {self.wait:g}; expected seconds, more than 0")

    @property
    def in_process(self) -> bool:
        """Whether the weights are loaded here."""
        return not self.urls

    @property
    def repeatable(self) -> bool:
        """Whether equal calls give equal responses; servers batch as requests happen to arrive."""
        return self.in_process

    @property
    def generation_batch(self) -> int:
        """See `evaluation.generation_batch`."""
        return generation_batch(
            in_process=self.in_process,
            max_batch_size=self.max_batch_size,
            max_concurrency=self.max_concurrency_per_server * len(self.urls),
        )

    @property
    def name(self) -> str:
        """For reports."""
        return f"in process, {self.dtype}" if self.in_process else "SGLang"


@contextmanager
def open_engine(choice: EngineChoice, model: ModelFolder, *, deadline: float) -> Iterator[RolloutEngine]:
    """An engine over `model`, closed at the end.

    Args:
        deadline: seconds within which servers must answer, `choice.wait` at most; loading in this process takes what
            it takes.

    Raises:
        TestTimeError: a server did not answer; or servers are named, but this installation has no client for them.
    """
    engine = _in_process(choice, model) if choice.in_process else _servers(choice, model, deadline)
    try:
        yield engine
    finally:
        engine.close()


def _in_process(choice: EngineChoice, model: ModelFolder) -> RolloutEngine:
    from megatron_laser.model import platform
    from megatron_laser.model.platform import DTYPES
    from megatron_laser.rollout.in_process import InProcessEngine

    return InProcessEngine(
        model.path,
        dtype=DTYPES[choice.dtype],
        device=platform.device(),
        max_batch_size=choice.max_batch_size,
    )


def _servers(choice: EngineChoice, model: ModelFolder, deadline: float) -> RolloutEngine:
    try:
        from megatron_laser.rollout.client import SglangEngine
        from megatron_laser.rollout.client.errors import ServersLost
        from megatron_laser.rollout.client.identify import SIZES, Expected
    except ImportError as error:
        raise TestTimeError(
            f"servers by URL need the SGLang client, which cannot be imported ({error}); leave --url out to load "
            "the model in this process"
        ) from error
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    try:
        engine = SglangEngine.connect(
            list(choice.urls),
            api_key=choice.api_key,
            expected=Expected(
                model.vocab_size,
                model_type=config.get("model_type"),
                sizes={name: config[name] for name in SIZES if name in config},
                tied=bool(config.get("tie_word_embeddings", False)),
            ),
            deadline=min(deadline, choice.wait),
            max_concurrency_per_server=choice.max_concurrency_per_server,
            router_url=choice.router_url,
        )
    except ServersLost as error:
        raise TestTimeError(
            f"{error}. Check the URL, or give a server that starts longer with --wait SECONDS"
        ) from error
    try:
        for url, facts in engine.identify_all().items():
            doubt = other_weights(model.path, Path(facts.model_path), facts.weight_version)
            if doubt:
                logger.warning("server %s %s: every number will be about the server's weights", url, doubt)
    except BaseException:
        engine.close()
        raise
    return engine


def other_weights(folder: Path, served: Path, version: str) -> str:
    """Why a server that was started on the folder `served` may hold other weights than `folder` has; "" if it does not.

    The same folder has different paths on different machines, so this is no reason to refuse a server.

    Args:
        version: of the server's weights; "default" until somebody sends some.
    """
    if version not in ("default", ""):
        return f"holds weights {version!r}, which a training run has sent it"
    try:
        same = served.samefile(folder)
    except OSError:  # its folder cannot be seen from here
        same = False
    return "" if same else f"was started on {served}, not on {folder}"

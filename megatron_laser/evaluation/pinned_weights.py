"""The engine of a command that takes minutes, and whether its weights are the same from beginning to end."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from megatron_laser.evaluation.engine_choice import EngineChoice, open_engine
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.weight_identity import FolderWeights, WeightsChanged, engine_digest
from megatron_laser.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)


class PinnedWeights:
    """Weights under one identity, and the engine that holds them, which is opened when it is first asked for.

    In this process the identity is that of the files, so that it needs no engine; of servers, and of an engine that is
    given, it is what they hold, so servers are connected to at once. Use as a context manager.

    Attributes:
        identity: of the weights, by content; None: servers do not tell, or it was not asked for.
    """

    def __init__(
        self,
        choice: EngineChoice,
        model: ModelFolder,
        *,
        deadline: float,
        engine: RolloutEngine | None = None,
        cache: Path | None = None,
        identify: bool = True,
    ) -> None:
        """
        Args:
            deadline: seconds within which servers must answer.
            engine: to use in place of one made of `choice`; it stays open.
            cache, identify: see `FolderWeights`.
        """
        self._choice = choice
        self._model = model
        self._deadline = deadline
        self._engine = engine
        self._cache = cache
        self._identify = identify
        self._folder: FolderWeights | None = None
        self._versions: dict[str, str] = {}
        self._stack = ExitStack()
        self.identity: str | None = None

    def __enter__(self) -> PinnedWeights:
        try:
            given = None if self._engine is None else engine_digest(self._engine)
            if given is not None:
                self.identity, self._versions = given, self._server_versions()
            elif self._choice.in_process:
                self._folder = FolderWeights(self._model.path, cache=self._cache, identify=self._identify)
                self._stack.callback(self._folder.close)
                self.identity = self._folder.identity
            else:
                self.identity = engine_digest(self.engine())
                self._versions = self._server_versions()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def engine(self) -> RolloutEngine:
        """Open it, or the one that is open. Raises as `open_engine` does, and WeightsChanged."""
        if self._engine is None:
            started = time.monotonic()
            self._engine = self._stack.enter_context(
                open_engine(self._choice, self._model, deadline=self._deadline)
            )
            if self._folder is not None:
                self._folder.check_loaded()
            logger.info(
                "the engine (%s) was ready after %.1f s", self._choice.name, time.monotonic() - started
            )
        return self._engine

    def seem_changed(self) -> bool:
        """Whether the weights seem to be others by now; asks nobody, so it may be asked often, from any thread."""
        if self._folder is not None:
            return self._folder.changed()
        return self._servers_differ(self._server_versions())

    def check(self) -> None:
        """Are they what they were?

        Raises:
            WeightsChanged: no; what was made with them since is of no one model.
            ServerError: a server does not say.
        """
        if self._folder is not None:
            self._folder.check()
            if self._folder.replaced():
                logger.warning(
                    "%s: other weights have taken the place of those that were loaded; the numbers are about the "
                    "latter%s",
                    self._model.path,
                    f" ({self.identity})" if self.identity else "",
                )
            return
        versions = self._server_versions()
        if self._servers_differ(versions) or engine_digest(self.engine()) != self.identity:
            raise WeightsChanged(
                f"the engine's weights were changed while they were in use (their names: {_told(self._versions)} "
                f"before, {_told(versions)} now); use servers that nobody else gives weights to"
            )

    def _server_versions(self) -> dict[str, str]:
        """URL -> the server's name of its weights, by its last probe; without servers that are gone."""
        fleet = getattr(self._engine, "fleet", None)
        members = [] if fleet is None else fleet.members
        return {member.url: member.health.version for member in members if member.health.version is not None}

    def _servers_differ(self, versions: dict[str, str]) -> bool:
        # One that is gone has not changed: it will be asked again when it is back.
        return any(self._versions.get(url, version) != version for url, version in versions.items())


def _told(versions: dict[str, str]) -> str:
    return ", ".join(sorted(set(versions.values()))) or "none"

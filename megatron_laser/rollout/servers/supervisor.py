"""Keeps a node's servers running: starts, asks, starts again, publishes, and ends all of them with itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_laser.rollout.endpoints import Endpoints, ServerEndpoint, publish
from megatron_laser.rollout.servers.fleet_plan import FleetPlan
from megatron_laser.rollout.servers.probe import Prober
from megatron_laser.rollout.servers.process import Guard, ServeError
from megatron_laser.rollout.servers.router import ManagedRouter
from megatron_laser.rollout.servers.server import ManagedServer

_TICK = 0.25  # seconds between two looks at the processes
_PROGRESS = 10.0  # seconds between two lines while servers start
_REPUBLISH = 30.0  # seconds after which an unchanged file is written again, so that its age says something
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL at the end


class Supervisor:
    """Runs the servers of one plan until it is told to stop.

    say: prints one line for the user.
    """

    def __init__(self, plan: FleetPlan, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.say = say
        self._servers = [ManagedServer(plan, number) for number in range(len(plan.ports))]
        self._router: ManagedRouter | None = None
        self._stop_reason: str | None = None
        self._published: Endpoints | None = None
        self._published_at = 0.0
        self._started = time.monotonic()
        self._said = self._started

    def stop(self, reason: str) -> None:
        """Ask the loop to end; may be called from a signal handler."""
        self._stop_reason = self._stop_reason or reason

    async def run(self, *, lock: int, outlive_parent: bool = False) -> None:
        """Start everything and watch over it until `stop`, a signal, the parent's end or a hopeless state.

        Args:
            lock: descriptor of a lock that shall be held until the last child is gone.
            outlive_parent: go on when the process that started this one ends.

        Raises:
            ServeError: a server did not come up at first, or all have died too often.
        """
        loop = asyncio.get_running_loop()
        hang_up = () if outlive_parent else (signal.SIGHUP,)  # nohup has it ignored, and so it stays
        for number in (signal.SIGTERM, signal.SIGINT, *hang_up):
            loop.add_signal_handler(number, self.stop, signal.Signals(number).name)
        parent = None if outlive_parent else os.getppid()
        guard = Guard(self.plan.mark, [*self.plan.settings_files(), self.plan.endpoints], (lock,))
        prober = Prober(self.plan.api_key)
        try:
            while self._stop_reason is None:
                if parent is not None and os.getppid() != parent:
                    self.stop(f"the process that started serve ({parent}) has ended")
                    break
                if guard.ensure_alive():
                    self.say("the watcher process was gone and has been started again")
                await self._tick(prober)
                await asyncio.sleep(_TICK)
            self.say(f"stopping: {self._stop_reason}")
        finally:
            await self._end(prober)
            await loop.run_in_executor(None, guard.close)

    async def _tick(self, prober: Prober) -> None:
        now = time.monotonic()
        updated = any(server.was_updated for server in self._servers)
        for server in self._servers:
            for line in await server.tick(prober, now, fleet_was_updated=updated):
                self.say(line)
        if all(server.slot.state == "failed" for server in self._servers):
            raise ServeError(
                "every server has died too often and is given up; the last reasons:\n"
                + "\n".join(f"  {server.describe_failure()}" for server in self._servers)
            )
        self._report_start(now)
        if self.plan.router_port is not None and self._all_answered_once():
            if self._router is None:
                self._router = ManagedRouter(self.plan)
            for line in await self._router.tick(prober, now, [server.url for server in self._servers]):
                self.say(line)
        self._publish(now)

    def _all_answered_once(self) -> bool:
        return all(server.slot.ever_answered for server in self._servers)

    def _report_start(self, now: float) -> None:
        starting = [server for server in self._servers if server.slot.state == "starting"]
        if starting and now - self._said >= _PROGRESS:
            self._said = now
            for server in starting:
                self.say(server.progress(now))

    def _publish(self, now: float, *, ending: bool = False) -> None:
        endpoints = Endpoints(
            servers=tuple(
                ServerEndpoint(
                    server.url,
                    max(server.slot.start, 1),
                    server.pid,
                    server.slot.state,
                    self.plan.installed.torch,
                    self.plan.installed.nccl,
                    server.nccl_settings,
                )
                for server in self._servers
            ),
            # from the start, since readers look once: it answers when all servers do, and comes back under this address
            router_url=None if self.plan.router_port is None else self.plan.url(self.plan.router_port),
            api_key=self.plan.api_key,
            model=str(self.plan.config.model.path),
            sglang_version=next((s.sglang_version for s in self._servers if s.sglang_version), None),
        )
        if endpoints == self._published and now - self._published_at < _REPUBLISH:
            return
        first = self._published is None
        try:
            publish(self.plan.endpoints, replace(endpoints, updated=time.time()))
        except OSError as error:
            if first:
                raise ServeError(f"{self.plan.endpoints} cannot be written: {error}") from error
            if self._published == endpoints:  # said once per change, not with every try
                return
            self.say(f"{self.plan.endpoints} cannot be written ({error}); readers see an old state")
        ready = all(server.slot.state in ("ready", "held") for server in self._servers)
        was_ready = self._published is not None and all(
            server.state in ("ready", "held") for server in self._published.servers
        )
        self._published, self._published_at = endpoints, now
        if ready and not was_ready:
            count = f"all {len(self._servers)} servers answer" if len(self._servers) > 1 else "ready"
            self.say(f"{count} after {now - self._started:.0f} s; endpoints in {self.plan.endpoints}")

    async def _end(self, prober: Prober) -> None:
        """End all children, and take back what was published. A second signal does not interrupt it."""
        await prober.close()
        children = [server.child for server in self._servers if server.child is not None]
        if self._router is not None and self._router.child is not None:
            children.append(self._router.child)
        for child in children:
            child.terminate()
        until = time.monotonic() + _GRACE
        while any(child.ended() is None for child in children) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        for path in (self.plan.endpoints, *self.plan.settings_files()):
            Path(path).unlink(missing_ok=True)
        problems = []
        for child in children:
            try:
                child.kill()
            except ServeError as error:
                problems.append(str(error))
        if problems:
            raise ServeError("; ".join(problems))
        self.say("all servers have ended")

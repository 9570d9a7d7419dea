"""sglang-router in front of the servers: started when all answer, started again when it ends, kept complete."""

from __future__ import annotations

import os

from megatron_laser.rollout.servers.command import router_command
from megatron_laser.rollout.servers.fleet_plan import FleetPlan
from megatron_laser.rollout.servers.ports import PortFinder
from megatron_laser.rollout.servers.probe import Prober
from megatron_laser.rollout.servers.process import ChildProcess, ServeError
from megatron_laser.rollout.servers.slot import MAX_RESTARTS, WINDOW, Slot

_CHECK_PAUSE = 3.0  # seconds between two looks at its workers
_START_DEADLINE = 120.0
_METRICS_PORTS = 29000  # the router insists on a port for metrics
_TAIL = 15


class ManagedRouter:
    """The router of a plan. `tick` is called again and again by one task."""

    def __init__(self, plan: FleetPlan) -> None:
        assert plan.router_port is not None
        self.plan = plan
        self.url = plan.url(plan.router_port)
        self.log = plan.folder / "router.log"
        self.slot = Slot(
            f"the router ({self.url})", _START_DEADLINE, plan.config.rollout.sglang.hang_deadline
        )
        self.child: ChildProcess | None = None
        self.answers = False  # knows a healthy worker
        self._next_check = 0.0
        self._asked: dict[str, float] = {}  # worker: when the router was told of it

    async def tick(self, prober: Prober, now: float, workers: list[str]) -> list[str]:
        """Look at it, complete its workers, start it; returns lines for the user.

        Raises:
            ServeError: it has ended too often.
        """
        lines = []
        if self.child is not None:
            if now >= self._next_check:
                self._next_check = now + (_CHECK_PAUSE if self.answers else 0.5)
                lines += await self._check(prober, now, workers)
            problem = self.slot.problem(now, self.child.ended())
            if problem is not None:
                lines.append(self._clean_up(problem, now))
        if self.slot.due(now):
            self._start(now, workers)
        return lines

    def _start(self, now: float, workers: list[str]) -> None:
        plan = self.plan
        assert plan.router_port is not None
        command = router_command(
            plan.config,
            python=plan.python,
            port=plan.router_port,
            metrics_port=PortFinder("127.0.0.1", _METRICS_PORTS).take(),
            workers=workers,
            api_key=plan.api_key,
            mark=f"{plan.mark}/router",
            environment=os.environ,
        )
        self.child = ChildProcess(command.arguments, command.environment, log=self.log, folder=plan.folder)
        self.answers = False
        self._asked = dict.fromkeys(workers, now)
        self.slot.started(now)

    async def _check(self, prober: Prober, now: float, workers: list[str]) -> list[str]:
        known = await prober.router_workers(self.url)
        if known is None:
            return []
        retry = self.plan.config.rollout.sglang.hang_deadline
        for worker in workers:
            # it gives up on a worker that does not come up in time, and registers none that is paused
            if worker not in known and now - self._asked.get(worker, 0.0) > retry:
                self._asked[worker] = now
                await prober.add_worker(self.url, worker, self.plan.api_key)
        if not any(known.values()):
            # without a healthy worker it is of no use, but that is not its fault
            if self.slot.state == "ready":
                self.slot.answered(now)
            return []
        first = self.slot.answered(now)
        self.answers = True
        return [f"{self.slot.name} answers for {len(known)} of {len(workers)} servers"] if first else []

    def _clean_up(self, problem: str, now: float) -> str:
        assert self.child is not None
        tail = self.child.tail(_TAIL)
        self.child.kill()
        self.child = None
        self.slot.failed(now, problem)
        if self.slot.state == "failed" or not self.slot.ever_answered:
            raise ServeError(
                f"{self.slot.name} {problem}; the end of {self.log}:\n  "
                + "\n  ".join(tail or ["(no output)"])
            )
        return (
            f"{self.slot.name} {problem}; starts again in {self.slot.retry_at - now:.0f} s "
            f"(restart {self.slot.recent_restarts} of {MAX_RESTARTS} in {WINDOW:g} s); log: {self.log}"
        )

"""One server of `serve`: its slot, its process, and the questions that it is asked."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import yaml

from megatron_laser.rollout.endpoints import write_private
from megatron_laser.rollout.nccl import server_settings
from megatron_laser.rollout.servers.command import initial_weight_version, server_command, warms_up
from megatron_laser.rollout.servers.fleet_plan import FleetPlan
from megatron_laser.rollout.servers.probe import Answer, Prober
from megatron_laser.rollout.servers.process import ChildProcess, ServeError
from megatron_laser.rollout.servers.slot import MAX_RESTARTS, WINDOW, Slot

_PROBE_PAUSE = 1.0  # seconds between two probes while it starts
_CALM_PROBE_PAUSE = 5.0  # and after that
_TAIL = 25  # lines of a log in an error


class ManagedServer:
    """Server `number` of the plan. `tick` is called again and again by one task."""

    def __init__(self, plan: FleetPlan, number: int) -> None:
        rollout = plan.config.rollout
        sglang = rollout.sglang
        self.plan = plan
        self.number = number
        self.url = plan.url(plan.ports[number])
        self.log = plan.folder / f"server_{number}.log"
        self.slot = Slot(
            f"server {number} ({self.url})",
            sglang.start_deadline,
            sglang.hang_deadline,
            # Loading from disk is one call of the scheduler, which answers nothing meanwhile.
            rollout.sync_deadline if rollout.weight_sync == "disk" else 0.0,
        )
        self._warms_up = warms_up(sglang)
        self.child: ChildProcess | None = None
        self.sglang_version: str | None = None
        self.nccl_settings: dict[str, str] | None = None  # with which its process computes
        self.was_updated = False  # some process here has held other weights than the first ones
        self._probe: asyncio.Task[tuple[Answer | None, bool | None]] | None = None
        self._next_probe = 0.0
        self._probed_start = 0

    @property
    def pid(self) -> int | None:
        """The server's process, None between two."""
        return self.child.pid if self.child is not None else None

    async def tick(self, prober: Prober, now: float, *, fleet_was_updated: bool) -> list[str]:
        """Look at the process, ask it, start it; returns lines for the user.

        Raises:
            ServeError: the very first process did not come up.
        """
        lines = []
        if self.child is not None:
            answer = self._collect_probe(prober, now)
            if answer is not None:
                lines += await self._answered(answer, prober, now, fleet_was_updated)
            problem = self.slot.problem(now, self.child.ended())
            if problem is not None:
                lines.append(await self._clean_up(problem, now))
        if self.slot.due(now):
            self._start(now)
        return lines

    def progress(self, now: float) -> str:
        """What a starting server is doing."""
        doing = self.child.last_line() if self.child is not None else ""
        return f"{self.slot.name} starts since {self.slot.age(now):.0f} s: {doing or 'no output yet'}"

    def describe_failure(self) -> str:
        """Why the slot was given up."""
        return f"{self.slot.name} {self.slot.reason}; log: {self.log}"

    def _start(self, now: float) -> None:
        plan = self.plan
        file = plan.settings_file(self.number)
        command = server_command(
            plan.config,
            python=plan.python,
            port=plan.ports[self.number],
            settings_file=file,
            api_key=plan.api_key,
            gpus=plan.gpus[self.number],
            mark=f"{plan.mark}/{self.number}",
            environment=os.environ,
        )
        self.nccl_settings = server_settings(command.environment, command.settings)
        try:
            write_private(file, yaml.safe_dump(command.settings))
        except OSError as error:
            raise ServeError(f"{file} cannot be written: {error}") from error
        self.child = ChildProcess(command.arguments, command.environment, log=self.log, folder=plan.folder)
        self.slot.started(now)

    def _collect_probe(self, prober: Prober, now: float) -> Answer | None:
        """The answer of a finished probe; begins the next one. One at a time: a hung server gets no pile of them."""
        answer = None
        if self._probe is not None and self._probe.done():
            if self._probed_start == self.slot.start:
                answer, takes_requests = self._probe.result()
                self.slot.paused = takes_requests is False
                if self._warms_up and self.slot.state == "starting" and self.slot.paused:
                    answer = None  # it is not ready yet: held now, it would wait for itself
            self._probe = None
            calm = min(_CALM_PROBE_PAUSE, self.slot.hang_deadline / 6)
            self._next_probe = now + (_PROBE_PAUSE if self.slot.state == "starting" else calm)
        if self._probe is None and now >= self._next_probe:
            # with the pause before it: two probes must fail in one hang_deadline, a single lost answer kills nothing
            self._probed_start = self.slot.start
            self._probe = asyncio.create_task(self._ask(prober))
        return answer

    async def _ask(self, prober: Prober) -> tuple[Answer | None, bool | None]:
        answer = await prober.ask(self.url, self.slot.hang_deadline / 3)
        return answer, await prober.takes_requests(self.url)

    async def _answered(
        self, answer: Answer, prober: Prober, now: float, fleet_was_updated: bool
    ) -> list[str]:
        self.sglang_version = answer.sglang_version
        initial = initial_weight_version(self.plan.config.rollout.sglang)
        current = answer.weight_version != initial
        self.was_updated |= current
        if not self.slot.answered(now):
            if self.slot.state == "held" and current:
                self.slot.state = "ready"
                return [f"{self.slot.name} has got the current weights"]
            return []
        line = f"{self.slot.name} answers {self.slot.age(now):.0f} s after its start (SGLang {answer.sglang_version})"
        await prober.freeze_gc(self.url)  # it makes a server faster; one that cannot serves all the same
        if fleet_was_updated and not current and await prober.hold(self.url, initial):
            # requests wait there until whoever trains has sent the weights and continued it
            self.slot.state = "held"
            line += "; it is paused until the run sends it the current weights"
        return [line]

    async def _clean_up(self, problem: str, now: float) -> str:
        """Clean up after a process that ended, hung or was late, and plan the next one."""
        assert self.child is not None
        tail = self.child.tail(_TAIL)
        if self._probe is not None:
            self._probe.cancel()
            with suppress(asyncio.CancelledError):
                await self._probe
            self._probe = None
        await asyncio.get_running_loop().run_in_executor(None, self.child.kill)
        self.child = None
        self._next_probe = 0.0
        if not self.slot.ever_answered:
            raise ServeError(
                f"{self.slot.name} {problem} before its first answer; the end of {self.log}:\n  "
                + "\n  ".join(tail or ["(no output)"])
            )
        self.slot.failed(now, problem)
        if self.slot.state == "failed":
            return (
                f"{self.slot.name} {problem}, more than {MAX_RESTARTS} times in {WINDOW:g} s: it is given up, the "
                f"other servers go on; log: {self.log}"
            )
        return (
            f"{self.slot.name} {problem}; starts again in {self.slot.retry_at - now:.0f} s "
            f"(restart {self.slot.recent_restarts} of {MAX_RESTARTS} in {WINDOW:g} s); log: {self.log}"
        )

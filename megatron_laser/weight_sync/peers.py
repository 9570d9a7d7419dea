"""Can trainer and servers form one process group? Asked of the facts, before anybody joins and hangs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from megatron_laser.config import ConfigError
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.nccl import SETTINGS, setting_problems, trainer_settings
from megatron_laser.weight_sync.feasibility import debug_problems, nccl_problem

logger = logging.getLogger(__name__)


class Peers:
    """What this process brings to a group with servers, and what it has said about them."""

    def __init__(
        self, *, torch_version: str, nccl_version: str | None, environment: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            nccl_version: of the library that this process's torch has loaded; None: it computes on a CPU.
            environment: of this process; None: as it is.
        """
        self._torch = torch_version
        self._nccl = nccl_version
        self._environment = os.environ if environment is None else environment
        self._said: set[str] = set()

    def backend(self, members: Sequence[Member]) -> str:
        """The group's backend, "nccl" or "gloo", as the servers' own word about their device has it.

        Raises:
            ConfigError: they are not all alike, the trainer has no GPU for theirs, NCCL differs in its version or in
                the settings of `rollout.nccl`, or the trainer's collectives are debugged in a way that theirs are not.
                torch may differ under gloo: its stores speak the same protocol.
        """
        if problems := debug_problems(self._environment):
            raise ConfigError(problems)
        devices = {member.device for member in members}
        if devices == {"cpu"}:
            self._say_torch(members)
            return "gloo"
        if "cpu" in devices:
            listed = ", ".join(f"{member.url} on {member.device}" for member in members)
            raise ConfigError(
                [
                    f"servers on CPUs and on GPUs cannot take one broadcast: {listed}; start all of them with one "
                    "rollout.sglang.device, or use rollout.weight_sync: disk"
                ]
            )
        if self._nccl is None:
            raise ConfigError(
                [
                    f"server {members[0].url} computes on a GPU and the trainer on a CPU, which NCCL does not connect; "
                    "use rollout.weight_sync: disk, or servers with rollout.sglang.device: cpu"
                ]
            )
        self._check_nccl(members, self._nccl)
        return "nccl"

    def _check_nccl(self, members: Sequence[Member], own: str) -> None:
        problems = []
        settings = trainer_settings(self._environment)
        for member in members:
            theirs, torch = member.endpoint.nccl_version, member.endpoint.torch_version
            if theirs is None:
                self._once(
                    member,
                    f"server {member.url} does not publish its NCCL version (servers given by URL cannot): it must be "
                    f"{own}, the trainer's, and {' and '.join(SETTINGS)} must be the same on both sides, or joining "
                    "the weight group fails or hangs",
                )
            elif (unlike := nccl_problem(own, theirs)) is not None:
                problems.append(
                    f"server {member.url} has NCCL {theirs} (torch {torch or 'unknown'}), the trainer NCCL {own} "
                    f"(torch {self._torch}): {unlike}; install one torch in both environments "
                    "(rollout.sglang.python), or use rollout.weight_sync: disk"
                )
            for problem in setting_problems(settings, member.endpoint.nccl_settings or {}):
                if problem not in problems:  # once, not for every server
                    problems.append(problem)
        if problems:
            raise ConfigError(problems)

    def _say_torch(self, members: Sequence[Member]) -> None:
        for member in members:
            theirs = member.endpoint.torch_version
            if theirs is None:
                self._once(
                    member,
                    f"server {member.url} does not publish its torch version; gloo takes any recent one",
                )
            elif theirs != self._torch:
                self._once(
                    member,
                    f"server {member.url} has torch {theirs}, the trainer {self._torch}; gloo takes both",
                )

    def _once(self, member: Member, text: str) -> None:
        if member.url not in self._said:
            self._said.add(member.url)
            logger.info("%s", text)

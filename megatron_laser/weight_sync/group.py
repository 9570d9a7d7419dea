"""The process group that trainer and servers share for broadcasts: hosted by the trainer, apart from its own groups.

Under torchrun every `tcp://` rendezvous becomes a client of the agent's store, so the trainer hosts a store of its
own. The servers join through `INIT_WEIGHTS_UPDATE_GROUP`, which makes the same kind of group from the same store.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_laser.config.addresses import host_and_port
from megatron_laser.model import platform
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.endpoints import write_private
from megatron_laser.rollout.sglang_api import INIT_WEIGHTS_UPDATE_GROUP, init_group_body
from megatron_laser.weight_sync.update import SyncFailed, Update

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 120.0


class UpdateGroup:
    """Rank 0 of a group with all tensor-parallel ranks of `members`."""

    def __init__(self, update: Update, name: str, *, backend: str, address: str, timeout: float) -> None:
        """Host a store, ask every server to join, and join; all at once.

        Raises SyncFailed, naming who did not come.
        """
        self.name = name
        self.members = {member: _process(member) for member in update.members}
        self.backend = backend
        seconds = min(_JOIN_SECONDS, update.left())
        self._timeout = timedelta(seconds=timeout)
        self._store = dist.TCPStore(
            address
            if address in ("127.0.0.1", "::1", "localhost")
            else "::"
            if ":" in address
            else "0.0.0.0",
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
        offsets = {}
        world = 1
        for member in update.members:
            offsets[member] = world
            world += member.tensor
        self._joined: Any = None
        trouble: list[BaseException] = []
        thread = threading.Thread(
            target=self._join, args=(world, seconds, trouble), name="weight group", daemon=True
        )
        thread.start()
        wanted = len(update.members)
        answers = update.post_all(
            INIT_WEIGHTS_UPDATE_GROUP,
            lambda member: init_group_body(
                name,
                backend=backend,
                address=address,
                port=self._store.port,
                rank_offset=offsets[member],
                world_size=world,
            ),
            phase="joining the weight group",
            seconds=seconds,
        )
        if len(answers) < wanted:
            raise SyncFailed(
                f"not all servers joined the weight group: {'; '.join(update.failures)}", retry=True
            )
        thread.join(timeout=seconds)
        if trouble or self._joined is None:
            reason = repr(trouble[0]) if trouble else f"not done in {seconds:g} s"
            raise SyncFailed(f"the trainer did not get into the weight group: {reason}", retry=True)

    def fits(self, members: list[Member]) -> bool:
        """Whether it consists of exactly these servers, with the processes that joined."""
        return {member: _process(member) for member in members} == self.members

    def is_whole(self, members: list[Member]) -> bool:
        """Whether all who joined are among `members`, still with the process that joined."""
        now = {member: _process(member) for member in members}
        return all(now.get(member) == process for member, process in self.members.items())

    def broadcast(self, tensor: torch.Tensor) -> dist.Work:
        """Start sending `tensor` to all servers."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        return self._joined.broadcast([tensor], options)

    def leave(self) -> None:
        """Give the trainer's side up without waiting for anybody: leaving a broken group can block for good."""
        group, self._joined = self._joined, None
        if group is not None:
            threading.Thread(
                target=_abandon, args=(group, self.backend), name="leaving a weight group", daemon=True
            ).start()

    def _join(self, world: int, seconds: float, trouble: list[BaseException]) -> None:
        try:
            self._joined = _make_group(
                self._store, self.name, world, self.backend, timedelta(seconds=seconds)
            )
        except BaseException as error:
            trouble.append(error)


def _process(member: Member) -> tuple[int, int]:
    """Changes when the server gets a new process, also one that nobody announced."""
    return member.start, member.health.deaths


def _abandon(group: Any, backend: str) -> None:
    c10d._world.pg_group_ranks.pop(group, None)
    if backend == "nccl":  # its kernels wait on the device for peers that may be gone
        group.abort()


def _make_group(store: dist.Store, name: str, world: int, backend: str, timeout: timedelta) -> Any:
    # What SGLang's init_custom_process_group does on the other side: the keys in the store must agree.
    group, _ = c10d._new_process_group_helper(
        world,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,
        backend_options=None,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def reachable_address(url: str) -> str:
    """The address of this machine from which it reaches `url`: loopback for a server on loopback."""
    family, kind, _, _, address = socket.getaddrinfo(*host_and_port(url), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


class PastGroups:
    """Names of the weight groups that servers still hold, in a file that outlives the trainer.

    After a trainer was killed, long-lived servers would hold one communicator's buffers more for every resume.
    """

    def __init__(self, file: Path | None) -> None:
        """Args: file: None: nothing is remembered, since the servers end with the run."""
        self._file = file
        self._names: list[str] = []
        if file is not None and file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                self._names = [name for name in found if isinstance(name, str)]
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s cannot be read, weight groups of an earlier run stay: %s", file, error)

    def of_other_sessions(self, session: str) -> list[str]:
        """Names of groups that no transport of `session` has made."""
        return [name for name in self._names if not name.startswith(f"laser-{session}-")]

    def add(self, name: str) -> None:
        """Before servers join it."""
        self._write([*self._names, name])

    def remove(self, names: list[str]) -> None:
        """Servers have been told to leave these."""
        self._write([name for name in self._names if name not in names])

    def _write(self, names: list[str]) -> None:
        if names == self._names:
            return
        self._names = names
        if self._file is None:
            return
        try:
            write_private(self._file, json.dumps(names) + "\n")
        except OSError as error:  # only a later run's tidying depends on it
            logger.warning("%s cannot be written, weight groups will outlive this run: %s", self._file, error)
            self._file = None


class Broadcast:
    """One or more broadcasts, in order, sent by a thread of their own; `tensors` live until this object is gone.

    A collective returns at once, but for the first one of a communicator, where NCCL connects all ranks: that does not
    end when a server is gone, and the training loop must be able to give up on it.
    """

    def __init__(self, send: Callable[[torch.Tensor], dist.Work], tensors: Sequence[torch.Tensor]) -> None:
        """Args: send: starts one of them."""
        self._tensors = list(tensors)
        self._works: list[dist.Work] = []
        self._error: BaseException | None = None
        self._issued = threading.Event()
        device = tensors[0].device.index if tensors else None

        def issue() -> None:
            try:
                if device is not None:
                    platform.set_local_device(device)  # a new thread has the first one
                for tensor in self._tensors:
                    self._works.append(send(tensor))
            except BaseException as error:
                self._error = error
            self._issued.set()

        # A daemon: one that never comes back must not keep the process from ending.
        threading.Thread(target=issue, name="weight broadcast", daemon=True).start()

    @property
    def issued(self) -> bool:
        """Whether the collectives have been started, so that the group's communicator is connected."""
        return self._issued.is_set()

    def done(self) -> bool:
        """Whether every server has everything. Raises RuntimeError when a broadcast failed."""
        if not self.issued:
            return False
        if self._error is not None:
            raise RuntimeError(str(self._error) or repr(self._error)) from self._error
        if not all(work.is_completed() for work in self._works):
            return False
        for work in self._works:
            work.wait()  # raises what went wrong on the device
        return True

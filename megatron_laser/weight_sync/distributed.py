"""Weights by broadcast: NCCL between GPUs, gloo between CPUs, bucket by bucket.

Rank 0 gathers a bucket from the trainer's ranks while the one before is on its way. Each bucket is announced to the
servers over HTTP and broadcast at the same time: a server that refuses would leave the broadcast hanging, so both
are watched, against one deadline, and at the deadline the group is aborted.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerError, ServerFault, ServerTimeout
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.sglang_api import (
    DESTROY_WEIGHTS_UPDATE_GROUP,
    UPDATE_WEIGHTS_FROM_DISTRIBUTED,
    from_distributed_body,
    leave_group_body,
    refusal,
)
from megatron_laser.weight_sync.buckets import Bucket, buckets
from megatron_laser.weight_sync.checksums import Checks, ServerLayout
from megatron_laser.weight_sync.fp8 import as_served
from megatron_laser.weight_sync.group import Broadcast, PastGroups, UpdateGroup, reachable_address
from megatron_laser.weight_sync.peers import Peers
from megatron_laser.weight_sync.update import SyncFailed, Update

logger = logging.getLogger(__name__)

_PHASE, _LEAVING = "receiving weights", "leaving an old weight group"
_LEAVE_SECONDS = 10.0
_CONNECTING = "connecting to the trainer for the first broadcast of a group"
_POLL = 0.002


@dataclass
class _InFlight:
    """A bucket on its way: the broadcasts, and each server's reply."""

    broadcast: Broadcast
    replies: dict[Member, Future[Any]]


class DistributedTransport:
    """A `WeightTransport` over a process group with the servers, kept from sync to sync."""

    def __init__(
        self,
        *,
        peers: Peers,
        dtype: torch.dtype,
        bucket_bytes: int,
        seconds: float,
        address: str | None,
        flattened: bool,
        always_verify: bool,
        layout: ServerLayout | None = None,
        quantized: bool = False,
        past_groups: Path | None = None,
    ) -> None:
        """
        Args:
            past_groups: file of the groups that servers hold, for servers that outlive the run.
            peers: decides between NCCL and gloo, and refuses what would hang.
            address: where servers reach this process; None: found out.
            flattened: one broadcast a bucket instead of one a tensor.
            quantized: matrices go in FP8, with their scales.
        """
        self.peers = peers
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._seconds = seconds
        self._address = address
        self._flattened = flattened
        self._quantized = quantized
        self._checks = Checks(always=always_verify, layout=layout)
        self._group: UpdateGroup | None = None
        self._groups = 0
        self._past = PastGroups(past_groups)

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """See `WeightTransport.send`. Raises SyncFailed; the group is then rebuilt at the next call."""
        update = Update(engine, label, seconds=self._seconds)
        digest = self._checks.digest(update.members, version)
        served = as_served(weights, dtype=self._dtype, quantized=self._quantized)
        watched = served if digest is None else digest.watch(served)
        try:
            with update.paused():
                group = self._join(update)
                update.begin_session()
                self._check_complete(update, group)
                self._stream(update, group, watched)
                update.end_session()
                self._check_complete(update, group)
                self._checks.verify(update, digest, version)
        except BaseException:
            self._leave()
            raise
        if len(update.members) < len(group.members):
            self._leave()

    def close(self) -> None:
        """Leave the group; the servers notice when they are next asked to join one."""
        self._leave()

    def _join(self, update: Update) -> UpdateGroup:
        if self._group is not None and self._group.fits(update.members):
            return self._group
        backend = self.peers.backend(update.members)
        session = update.engine.session
        if self._group is not None:
            # With a peer that is gone, leaving may wait for it on the device: such a group is left to the servers.
            if self._group.is_whole(update.members):
                self._forget(update, [self._group.name])
            self._leave()
        self._forget(update, self._past.of_other_sessions(session))
        update.require_members()
        self._groups += 1
        name = f"laser-{session}-{self._groups}"
        self._past.add(name)
        address = self._address or reachable_address(update.members[0].url)
        self._group = UpdateGroup(update, name, backend=backend, address=address, timeout=self._seconds)
        return self._group

    def _forget(self, update: Update, names: list[str]) -> None:
        """Servers leave these groups, if they are in them. One that stops answering over it is dropped."""
        for name in names:

            async def one(member: Member, body: dict[str, Any]) -> None:
                post = member.client.post
                await post(DESTROY_WEIGHTS_UPDATE_GROUP, body, deadline=_LEAVE_SECONDS, phase=_LEAVING)

            work = functools.partial(one, body=leave_group_body(name))
            found = update.gather(work, list(update.members), _LEAVE_SECONDS, _LEAVING)
            self._past.remove([name])  # not a second time: it is not worth another server
            for member, result in found.items():
                if isinstance(result, ServerTimeout):
                    update.drop(member, result)
                elif isinstance(result, ServerError):
                    logger.debug("server %s: %s", member.url, result)

    def _check_complete(self, update: Update, group: UpdateGroup) -> None:
        if len(update.members) < len(group.members):
            raise SyncFailed(f"a server left during the sync: {'; '.join(update.failures)}", retry=True)

    def _stream(
        self, update: Update, group: UpdateGroup, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        flight: _InFlight | None = None
        for bucket in buckets(weights, self._bucket_bytes):
            if flight is not None:
                self._wait_for(update, flight)
            # What has arrived goes before the next one is made: two buckets at a time, this one and one that grows.
            flight = None
            flight = self._start(update, group, bucket)
            del bucket
        if flight is not None:
            self._wait_for(update, flight)

    def _start(self, update: Update, group: UpdateGroup, bucket: Bucket) -> _InFlight:
        label = update.label if bucket.last else None
        body = from_distributed_body(
            bucket.describe(), group=group.name, flattened=self._flattened, label=label
        )
        sent = [bucket.flat()] if self._flattened else [tensor for _, tensor in bucket.tensors]
        if group.backend == "gloo":
            sent = [tensor.cpu() for tensor in sent]
        replies = {
            member: asyncio.run_coroutine_threadsafe(
                member.client.post(
                    UPDATE_WEIGHTS_FROM_DISTRIBUTED, body, deadline=update.left(), phase=_PHASE
                ),
                update.engine.loop,
            )
            for member in update.members
        }
        return _InFlight(Broadcast(group.broadcast, sent), replies)

    def _wait_for(self, update: Update, flight: _InFlight) -> None:
        """Until every server has the bucket.

        Raises SyncFailed as soon as one refuses or dies, or at the deadline: the group is broken then, and the
        others hold half of the weights.
        """
        waiting = dict(flight.replies)
        sent = False
        while waiting or not sent:
            for member, reply in list(waiting.items()):
                if reply.done():
                    self._check_reply(update, member, reply)
                    del waiting[member]
            try:
                sent = flight.broadcast.done()
            except RuntimeError as error:
                raise SyncFailed(
                    f"weights {update.label}: the broadcast to {_urls(flight.replies)} failed: {error}",
                    retry=True,
                ) from error
            gone = [member for member in waiting if member.health.state.value in ("dead", "restarting")]
            phase = _PHASE if flight.broadcast.issued else _CONNECTING
            if gone:
                raise SyncFailed(f"weights {update.label}: {_urls(gone)} died while {phase}", retry=True)
            if time.monotonic() > update.ends:
                raise SyncFailed(
                    f"weights {update.label}: {_urls(waiting or flight.replies)} not done within "
                    f"rollout.sync_deadline {self._seconds:g} s: {phase}",
                    retry=True,
                )
            if waiting or not sent:
                time.sleep(_POLL)

    def _check_reply(self, update: Update, member: Member, reply: Future[Any]) -> None:
        error = reply.exception()
        if error is None and (why := refusal(reply.result())) is not None:
            error = ServerFault(member.url, _PHASE, why)
        if error is None:
            return
        if not isinstance(error, ServerError):
            raise error
        update.drop(member, error)
        raise SyncFailed(f"weights {update.label}: {error}", retry=True) from error

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.leave()


def _urls(members: Iterable[Member]) -> str:
    return ", ".join(member.url for member in members)

"""Weights by broadcast: NCCL between GPUs, gloo between CPUs, bucket by bucket.

Rank 0 gathers a bucket from the trainer's ranks while the one before is on its way. Each bucket is announced to the
servers over HTTP and broadcast at the same time: a server that refuses would leave the broadcast hanging, so both
are watched, against one deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_laser.rollout.sglang.engine import SglangEngine
from megatron_laser.rollout.sglang.errors import ServerError, ServerFault
from megatron_laser.rollout.sglang.member import Member
from megatron_laser.weight_sync.buckets import Bucket, buckets
from megatron_laser.weight_sync.checksums import StreamDigest
from megatron_laser.weight_sync.control import SyncFailed, Update
from megatron_laser.weight_sync.group import UpdateGroup, reachable_address
from megatron_laser.weight_sync.peers import Peers
from megatron_laser.weight_sync.verify import verify

logger = logging.getLogger(__name__)

_PHASE = "receiving weights"
_POLL = 0.002


@dataclass
class _Flight:
    """A bucket on its way: the broadcasts, and each server's reply."""

    works: list[dist.Work]
    sent: list[torch.Tensor]  # alive until the broadcast is over
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
    ) -> None:
        """
        Args:
            peers: decides between NCCL and gloo, and refuses what would hang.
            address: where servers reach this process; None: found out.
            flattened: one broadcast a bucket instead of one a tensor.
        """
        self.peers = peers
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._seconds = seconds
        self._address = address
        self._flattened = flattened
        self._verify = always_verify
        self._first = True
        self._group: UpdateGroup | None = None
        self._groups = 0

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """See `WeightTransport.send`. Raises SyncFailed; the group is then rebuilt at the next call."""
        update = Update(engine, label, seconds=self._seconds)
        digest = StreamDigest(dtype=self._dtype, hashed=update.on_cpu)
        watched = digest.watch(weights) if self._verify or self._first else weights
        try:
            with update.paused():
                group = self._join(update)
                update.begin_session()
                self._all_there(update, group)
                self._stream(update, group, watched)
                update.end_session()
                self._all_there(update, group)
                if self._verify or self._first:
                    verify(update, digest)
        except BaseException:
            self._leave()
            raise
        if len(update.members) < len(group.members):
            self._leave()
        self._first = False

    def close(self) -> None:
        """Leave the group; the servers notice when they are next asked to join one."""
        self._leave()

    def _join(self, update: Update) -> UpdateGroup:
        if self._group is not None and self._group.fits(update.members):
            return self._group
        if self._group is not None:
            self._forget(update, self._group)
            self._leave()
        backend = self.peers.backend(update.members)
        self._groups += 1
        name = f"laser-{update.engine.session}-{self._groups}"
        address = self._address or reachable_address(update.members[0].url)
        self._group = UpdateGroup(update, name, backend=backend, address=address, timeout=self._seconds)
        return self._group

    def _forget(self, update: Update, group: UpdateGroup) -> None:
        """Servers that stay in the run leave the old group; whether they can is not important."""

        async def one(member: Member) -> None:
            body = {"group_name": group.name}
            await member.client.post(
                "/destroy_weights_update_group", body, deadline=10.0, phase="leaving the weight group"
            )

        for member, result in update.gather(one, update.members, 10.0, "leaving the weight group").items():
            if isinstance(result, ServerError):
                logger.debug("server %s: %s", member.url, result)

    def _all_there(self, update: Update, group: UpdateGroup) -> None:
        if len(update.members) < len(group.members):
            raise SyncFailed(f"a server left during the sync: {'; '.join(update.failures)}", retry=True)

    def _stream(
        self, update: Update, group: UpdateGroup, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        flight: _Flight | None = None
        for bucket in buckets(weights, self._bucket_bytes, dtype=self._dtype):
            if flight is not None:
                self._land(update, flight)
            # What has landed goes before the next one is made: two buckets at a time, this one and one that grows.
            flight = None
            flight = self._start(update, group, bucket)
            del bucket
        if flight is not None:
            self._land(update, flight)

    def _start(self, update: Update, group: UpdateGroup, bucket: Bucket) -> _Flight:
        body: dict[str, Any] = bucket.describe() | {"group_name": group.name, "flush_cache": bucket.last}
        if bucket.last:
            body["weight_version"] = update.label
        if self._flattened:
            body["load_format"] = "flattened_bucket"
            sent = [bucket.flat()]
        else:
            sent = [tensor for _, tensor in bucket.tensors]
        if group.backend == "gloo":
            sent = [tensor.cpu() for tensor in sent]
        replies = {
            member: asyncio.run_coroutine_threadsafe(
                member.client.post(
                    "/update_weights_from_distributed", body, deadline=update.left(), phase=_PHASE
                ),
                update.engine.loop,
            )
            for member in update.members
        }
        try:
            works = [group.broadcast(tensor) for tensor in sent]
        except RuntimeError as error:
            raise SyncFailed(f"weights {update.label}: the broadcast failed: {error}", retry=True) from error
        return _Flight(works, sent, replies)

    def _land(self, update: Update, flight: _Flight) -> None:
        """Until every server has the bucket.

        Raises SyncFailed as soon as one refuses or dies, or at the deadline: the group is broken then, and the
        others hold half of the weights.
        """
        waiting = dict(flight.replies)
        works = list(flight.works)
        while waiting or works:
            for member, reply in list(waiting.items()):
                if reply.done():
                    self._check_reply(update, member, reply)
                    del waiting[member]
            try:
                works = [work for work in works if not work.is_completed()]
            except RuntimeError as error:
                raise SyncFailed(
                    f"weights {update.label}: the broadcast failed: {error}", retry=True
                ) from error
            dead = [member for member in waiting if member.health.state.value in ("dead", "restarting")]
            if dead or time.monotonic() > update.ends:
                names = ", ".join(member.url for member in dead or waiting) or "the broadcast itself"
                what = "died while" if dead else f"not done within rollout.sync_deadline {self._seconds:g} s:"
                raise SyncFailed(f"weights {update.label}: {names} {what} {_PHASE}", retry=True)
            if waiting or works:
                time.sleep(_POLL)
        for work in flight.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise SyncFailed(
                    f"weights {update.label}: the broadcast failed: {error}", retry=True
                ) from error

    def _check_reply(self, update: Update, member: Member, reply: Future[Any]) -> None:
        error = reply.exception()
        answer = None if error is not None else reply.result()
        if error is None and isinstance(answer, dict) and answer.get("success") is False:
            error = ServerFault(member.url, _PHASE, str(answer.get("message")))
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

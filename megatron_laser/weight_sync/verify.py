"""Comparing the servers' weights with the trainer's after an update, while generation is still paused."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch

from megatron_laser.rollout.client.errors import ServerFault, StaleServer
from megatron_laser.rollout.client.member import Member
from megatron_laser.weight_sync.checksums import (
    ServerLayout,
    StreamDigest,
    differences,
    fingerprint,
    no_checksums,
    not_compared,
)
from megatron_laser.weight_sync.control import Update, on_cpu

logger = logging.getLogger(__name__)

_SECONDS = 300.0
_SHOWN = 3
_PHASE = "comparing checksums"
_VERSIONS = (
    2  # the first weights sent are often those that servers have loaded: only the next ones prove an update
)


class Checks:
    """Which syncs are verified: every one, or the first weights and the first other ones."""

    def __init__(self, *, always: bool, layout: ServerLayout | None = None) -> None:
        self._always = always
        self._layout = layout or ServerLayout()
        self._versions: set[int] = set()
        self._said: set[str] = set()

    def digest(self, members: list[Member], dtype: torch.dtype, version: int) -> StreamDigest | None:
        """For the stream of `version` that `members` are about to get; None: that sync is not verified."""
        if not (self._always or (len(self._versions) < _VERSIONS and version not in self._versions)):
            return None
        sizes = {member.tensor for member in members}
        return StreamDigest(dtype=dtype, on_cpu=on_cpu(members), sizes=sizes, layout=self._layout)

    def verify(self, update: Update, digest: StreamDigest | None, version: int) -> None:
        """Drops every server of `update` whose weights are not those that `digest` saw; nothing for None.

        Raises SyncFailed when none is left.
        """
        if digest is None:
            return
        for size in {member.tensor for member in update.members}:
            reason = not_compared(digest, size)
            if reason is not None and reason not in self._said:
                self._said.add(reason)
                logger.warning(
                    "weights of servers are not compared with the trainer's, or not all, but with each other only: %s",
                    reason,
                )
        verify(update, digest)
        self._versions.add(version)


def verify(update: Update, digest: StreamDigest) -> None:
    """See `Checks.verify`."""
    reports = update.post_all("/weights_checker", {"action": "checksum"}, phase=_PHASE, seconds=_SECONDS)
    for member, report in reports.items():
        unclear = no_checksums(report)
        if unclear is not None:
            update.drop(member, ServerFault(member.url, _PHASE, unclear))
            continue
        wrong = [] if digest.layout.quantized is not None else differences(digest, report)
        if wrong:
            shown = "; ".join(wrong[:_SHOWN]) + (
                f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            )
            update.drop(
                member, StaleServer(member.url, _PHASE, f"its weights are not the trainer's: {shown}")
            )
    _compare_servers(
        update, {member: report for member, report in reports.items() if member in update.members}
    )
    update.need_some()


def _compare_servers(update: Update, reports: dict[Member, Any]) -> None:
    groups: dict[int, dict[tuple[str, ...], list[Member]]] = defaultdict(lambda: defaultdict(list))
    for member, report in reports.items():
        groups[member.tensor][fingerprint(report)].append(member)
    for same in groups.values():
        largest = max(same.values(), key=len)
        for members in same.values():
            if members is not largest:
                for member in members:
                    message = f"its weights differ from those of {largest[0].url}, which got the same update"
                    update.drop(member, StaleServer(member.url, _PHASE, message))

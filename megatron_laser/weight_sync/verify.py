"""Comparing the servers' weights with the trainer's after an update, while generation is still paused."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

from megatron_laser.rollout.sglang.errors import ServerError, ServerFault, ServerRefused, StaleServer
from megatron_laser.rollout.sglang.member import Member
from megatron_laser.weight_sync.checksums import StreamDigest, differences, fingerprint, no_checksums
from megatron_laser.weight_sync.control import Update

logger = logging.getLogger(__name__)

_SECONDS = 300.0
_SHOWN = 3
_PHASE = "comparing checksums"


def verify(update: Update, digest: StreamDigest) -> None:
    """Drops every server of `update` whose weights are not those that `digest` saw.

    Raises SyncFailed when none is left.
    """
    reports = update.post_all("/weights_checker", {"action": "checksum"}, phase=_PHASE, seconds=_SECONDS)
    sums = digest.sums()
    for member, report in reports.items():
        unclear = no_checksums(report)
        if unclear is not None:
            update.drop(member, ServerFault(member.url, _PHASE, unclear))
            continue
        try:
            wrong = differences(sums, report) if sums else _different_values(update, member, digest)
        except ServerRefused as error:
            # SGLang reads weights back for a few kinds of model only: no word against this server.
            logger.warning("%s; its checksums are compared with other servers' only", error)
            continue
        except ServerError as error:
            update.drop(member, error)
            continue
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


def _different_values(update: Update, member: Member, digest: StreamDigest) -> list[str]:
    """Sampled values of each tensor, read back by name."""

    async def read(name: str, count: int) -> Any:
        body = {"name": name, "truncate_size": count}
        return await member.client.post("/get_weights_by_name", body, deadline=_SECONDS, phase=_PHASE)

    wrong = []
    for name, ours in _first_and_last(digest.values):
        theirs = _flatten(update.engine.run(read(name, len(ours)), _SECONDS, _PHASE))[: len(ours)]
        if theirs != ours[: len(theirs)] or not theirs:
            wrong.append(f"{name} begins with {theirs[:3]} instead of {ours[:3]}")
    return wrong


def _first_and_last(values: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    """A few tensors from both ends of the model: a stale server differs in all of them."""
    items = list(values.items())
    return items if len(items) <= 8 else items[:4] + items[-4:]


def _flatten(value: Any) -> list[float]:
    if isinstance(value, list):
        return [item for part in value for item in _flatten(part)]
    return [float(value)] if isinstance(value, int | float) else []

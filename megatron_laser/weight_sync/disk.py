"""Weights through a folder that trainer and servers share: for any topology, and for servers that come back.

The folder is complete before a server hears of it, so the pause is only as long as loading takes. The newest one is
kept: a server that was restarted is given it without the trainer's help.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.sglang_api import (
    CONTINUE_GENERATION,
    UPDATE_WEIGHTS_FROM_DISK,
    continue_body,
    from_disk_body,
)
from megatron_laser.weight_sync.checksums import Checks, ServerLayout
from megatron_laser.weight_sync.fp8 import as_served
from megatron_laser.weight_sync.update import Update, check_version, pause_and_flush

logger = logging.getLogger(__name__)

_PREFIX = "weights-"


class DiskTransport:
    """A `WeightTransport` that writes `folder`/weights-LABEL."""

    def __init__(
        self,
        folder: Path,
        *,
        source: Path,
        dtype: torch.dtype,
        seconds: float,
        always_verify: bool,
        layout: ServerLayout | None = None,
        quantized: bool = False,
    ) -> None:
        """
        Args:
            source: the model's Hugging Face folder, for its configuration and tokenizer.
            always_verify: compare checksums after every sync, not only the first two versions.
            quantized: matrices are written in FP8, with their scales. The folder's config.json says nothing of it: what
                loads it are servers that were started for that.
        """
        self._folder = folder
        self._source = source
        self._dtype = dtype
        self._seconds = seconds
        self._quantized = quantized
        self._checks = Checks(always=always_verify, layout=layout)
        self._current: tuple[str, Path] | None = None
        self._written: set[Path] = set()

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """See `WeightTransport.send`. Raises SyncFailed, OSError (a full disk, a folder that is not writable)."""
        engine.identify_late()  # those that cannot be used are left out by the update
        fit = [member for member in engine.fleet.updatable() if member.identified]
        digest = self._checks.digest(fit, version)
        served = as_served(weights, dtype=self._dtype, quantized=self._quantized)
        watched = served if digest is None else digest.watch(served)
        target = self._folder / f"{_PREFIX}{label}"
        self._written.add(target)
        write_hf_folder(watched, target, source=self._source, dtype=self._dtype, cast=False)
        update = Update(engine, label, seconds=self._seconds)
        with update.paused():
            body = from_disk_body(str(target), label)
            update.post_all(
                UPDATE_WEIGHTS_FROM_DISK, body, phase="loading weights from disk", seconds=self._seconds
            )
            self._checks.verify(update, digest, version)
            self._current = (
                label,
                target,
            )  # before the label is the wanted one: catching up must not get older ones
        engine.fleet.catch_up = self._catch_up
        self._remove_old(target)

    async def _catch_up(self, member: Member) -> str:
        """Give a server that came back the newest folder; runs in the engine's event loop. Returns its label."""
        assert self._current is not None
        label, target = self._current
        phase = "catching up from disk"
        client, seconds = member.client, self._seconds
        await pause_and_flush(member, seconds)
        body = from_disk_body(str(target), label)
        await client.post(UPDATE_WEIGHTS_FROM_DISK, body, deadline=seconds, phase=phase)
        await check_version(member, label, deadline=seconds, phase=phase)
        await client.post(CONTINUE_GENERATION, continue_body(), deadline=seconds, phase=phase)
        logger.info("server %s has caught up with weights %s", member.url, label)
        return label

    def _remove_old(self, current: Path) -> None:
        for folder in self._folder.glob(f"{_PREFIX}*"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)
        self._written = {current}

    def close(self) -> None:
        """Delete the weights: the run has its own copy, and nobody else is told of this one."""
        for folder in self._written:  # also what a failed sync has left
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
        self._written.clear()
        self._current = None

"""Steps whose loss or gradient was not finite: counted, kept for a replay, and after too many in a row the end."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config.loading import resolved_yaml
from megatron_laser.config.readouts import readout_setting, readouts
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.broadcast import save_arrays
from megatron_laser.distributed.runtime import Runtime
from megatron_laser.errors import DataError, UserError
from megatron_laser.files import replace_folder
from megatron_laser.trainer.checkpoint.folder import checkpoint_root, published
from megatron_laser.trainer.forward_backward import OptimizerStep

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_BATCH, _CONFIG, _META = "batch.npz", "config.yaml", "meta.json"


class BadStepsError(UserError, RuntimeError):
    """`run.max_bad_steps` steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Dump:
    """A dumped batch: `meta` as in meta.json; `config` is the path of the run's resolved YAML."""

    flat: FlatBatch
    config: Path
    meta: dict[str, Any]


class BadSteps:
    """Counts steps with skipped updates; every rank has one and they all count alike."""

    def __init__(self, config: RunConfig, runtime: Runtime, *, score_token_id: int | None) -> None:
        self._config = config
        self._runtime = runtime
        self._score_token_id = score_token_id
        self._in_a_row = 0

    def note(self, flat: FlatBatch, step: int, updates: Sequence[OptimizerStep]) -> None:
        """Take in one step. Rank 0 dumps its batch to output_dir/bad_steps/step_N when an update was skipped.

        Raises:
            BadStepsError: on all ranks, when this was the last of `run.max_bad_steps` in a row.
        """
        bad = [update for update in updates if update.bad]
        if not bad:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        folder = Path(self._config.run.output_dir) / "bad_steps" / f"step_{step}"
        meta = self._meta(flat, step, bad, len(updates))
        if self._runtime.is_main:
            logger.error("step %d: %s; its batch is kept in %s", step, meta["reason"], folder)
            try:
                write_dump(folder, flat, self._config, meta)
            except OSError as error:
                logger.error("step %d: the batch cannot be written to %s: %s", step, folder, error)
        if self._in_a_row < self._config.run.max_bad_steps:
            return
        if self._runtime.world_size > 1:
            # A rank that fails is the end of all ranks: not before the dump is written.
            dist.barrier(group=self._runtime.cpu_group)
        raise BadStepsError(
            f"step {step}, rank {self._runtime.rank}: {self._in_a_row} steps in a row (run.max_bad_steps) had a "
            f"loss or gradient that is not finite; the last one: {meta['reason']}. The skipped updates changed no "
            f"weights. The batch is in {folder}: look at it with `megatron-laser replay {folder}`; "
            + _cure(self._config, meta["bad_terms"])
        )

    def _meta(self, flat: FlatBatch, step: int, bad: list[OptimizerStep], updates: int) -> dict[str, Any]:
        first = bad[0]
        where = f"epoch {first.epoch}, minibatch {first.minibatch}"
        reason = f"{', '.join(first.bad)} not finite ({where}; gradient norm {first.grad_norm:g})"
        found = published(checkpoint_root(self._config)) if self._runtime.is_main else []
        return {
            "format_version": FORMAT_VERSION,
            "step": step,
            "weight_version": flat.weight_version,
            "reason": f"{len(bad)} of {updates} optimizer step(s) skipped: {reason}",
            "bad_terms": sorted({name for update in bad for name in update.bad}),
            "skipped": [
                {
                    "epoch": update.epoch,
                    "minibatch": update.minibatch,
                    "bad_terms": list(update.bad),
                    "grad_norm": str(update.grad_norm),  # text: JSON has no infinity
                }
                for update in bad
            ],
            "score_token_id": self._score_token_id,
            "world_size": self._runtime.world_size,
            # Weights are not dumped: these are the nearest that are kept.
            "newest_checkpoint": str(found[-1][1]) if found else None,
            "initial_model": str(self._config.model.path),
        }


def _cure(config: RunConfig, bad_terms: Sequence[str]) -> str:
    """What to do about it, by the settings that the user wrote."""
    weights = [
        readout_setting(config, index, "weight")
        for index, readout in enumerate(readouts(config))
        if readout.first_step is not None
    ]
    *names, last = ["optimizer.lr", *dict.fromkeys(weights)]
    listed = f"{', '.join(names)} or {last}" if names else last
    policy = config.policy
    own = f", at policy.loss {policy.loss}" if "policy_loss" in bad_terms and ":" in policy.loss else ""
    return f"lower {listed}, or look at its rewards and log-probs{own}"


def write_dump(folder: Path, flat: FlatBatch, config: RunConfig, meta: dict[str, Any]) -> None:
    """Write batch.npz (plain arrays), config.yaml and meta.json; complete or not there at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_arrays(partial / _BATCH, flat.to_arrays())
    (partial / _CONFIG).write_text(resolved_yaml(config), encoding="utf-8")
    (partial / _META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    # It is there when the run was resumed from before this step and met it again.
    replace_folder(partial, folder, aside=folder.with_name(folder.name + ".old"))


def read_dump(folder: Path) -> Dump:
    """What `write_dump` wrote. Nothing is unpickled.

    Raises:
        DataError: names the file that is missing, damaged or too new.
    """
    for name in (_BATCH, _CONFIG, _META):
        if not (folder / name).is_file():
            raise DataError(f"{folder} has no {name}: expected a folder such as OUTPUT_DIR/bad_steps/step_12")
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        version = int(meta["format_version"])
        with np.load(folder / _BATCH, allow_pickle=False) as archive:
            flat = FlatBatch.from_arrays({name: archive[name] for name in archive.files})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"{folder} has format {version}, this version of megatron_laser reads up to {FORMAT_VERSION}; "
            "upgrade megatron_laser"
        )
    return Dump(flat, folder / _CONFIG, meta)

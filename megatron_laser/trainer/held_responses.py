"""The responses on which a run watches its score token: chosen once, kept in a file, the same after every resume."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.broadcast import save_arrays
from megatron_laser.errors import DataError
from megatron_laser.files import write_atomically

HELD = "held_responses.npz"
FORMAT_VERSION = 1
_C_REF, _VERSION = "c_ref", "format_version"


@dataclass(frozen=True)
class HeldResponses:
    """Scored responses of one step's rollouts with their verdicts.

    flat: these alone; its `step` is the one that they are of, and its `zc_logprobs` [samples] are log pi(z_c) under the
    weights before that step's update. c_ref: what they are compared with, nats.
    """

    flat: FlatBatch
    c_ref: float

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays, for the file and for other ranks."""
        own = {_C_REF: np.array(self.c_ref, np.float64), _VERSION: np.array(FORMAT_VERSION, np.int64)}
        return self.flat.to_arrays() | own

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> HeldResponses:
        """The inverse of `to_arrays`. Raises ValueError for missing, unknown or unfit arrays."""
        own = dict(arrays)
        if missing := [name for name in (_C_REF, _VERSION) if name not in own]:
            raise ValueError(f"array {missing[0]!r} is missing")
        version, c_ref = int(own.pop(_VERSION)), float(own.pop(_C_REF))
        if version > FORMAT_VERSION:
            raise ValueError(f"format {version}; this version of megatron_laser reads up to {FORMAT_VERSION}")
        flat = FlatBatch.from_arrays(own)
        known = np.isfinite(flat.rewards).all() and flat.scored.all()
        if not (flat.num_samples and known and math.isfinite(c_ref)):
            raise ValueError("expected responses that all are scored and graded, and a finite c_ref")
        return cls(flat, c_ref)


def first_scored(flat: FlatBatch, least: int) -> npt.NDArray[np.int64]:
    """The scored samples of the batch's first groups: whole groups, until there are `least` or no more."""
    scored = flat.scored & np.isfinite(flat.rewards)
    count = np.cumsum(scored)
    enough = np.flatnonzero(count >= least)
    if len(enough):
        same = flat.group_ids == flat.group_ids[enough[0]]
        scored = scored & (np.arange(len(scored)) <= np.flatnonzero(same)[-1])
    return np.flatnonzero(scored)


def only(flat: FlatBatch, samples: npt.NDArray[np.int64], *, step: int) -> FlatBatch:
    """`samples` of a batch, without what a forward for their scores does not need; `step` is written on them."""
    tokens = [flat.tokens[flat.token_offsets[i] : flat.token_offsets[i + 1]] for i in samples]
    logprobs = [
        flat.rollout_logprobs[flat.response_offsets[i] : flat.response_offsets[i + 1]] for i in samples
    ]
    return FlatBatch(
        step=step,
        weight_version=flat.weight_version,
        tokens=np.concatenate(tokens),
        prompt_lengths=flat.prompt_lengths[samples],
        response_lengths=flat.response_lengths[samples],
        group_ids=flat.group_ids[samples],
        rewards=flat.rewards[samples],
        scored=flat.scored[samples],
        rollout_logprobs=np.concatenate(logprobs),
        zc_logprobs=np.full(len(samples), np.nan, np.float32),
        routed_tokens=np.zeros(len(samples), np.int32),  # later weights route anew
        routed_experts=np.zeros((0, 0), np.uint8),
    )


def write_held(config: RunConfig, held: HeldResponses) -> Path:
    """Write the run's file; complete or not there at all. Raises OSError."""
    file = Path(config.run.output_dir) / HELD
    written = io.BytesIO()
    save_arrays(written, held.to_arrays())
    write_atomically(file, written.getvalue())
    return file


def read_held(config: RunConfig) -> HeldResponses | None:
    """What `write_held` wrote; None where there is no file, or the run does not ask for it. Nothing is unpickled.

    Raises:
        DataError: the file is damaged, too new, or not such a file.
    """
    file = Path(config.run.output_dir) / HELD
    if not (config.laser.enabled and config.laser.drift_every and file.exists()):
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            return HeldResponses.from_arrays({name: archive[name] for name in archive.files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} cannot be read ({error}): laser.drift_every compares with the responses in it. Bring the file "
            "back; or delete it, and the run takes responses of its next step; or set laser.drift_every to 0"
        ) from error

"""What the log-prob op may use of the device's memory; one setting for the process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Bytes; both apply to the Triton backend, and change only speed and memory, not what is computed.

    tile_bytes: one tile of float32 logits. 528 MiB is 8448 columns of 16384 rows, and 18 times that is a vocabulary
        of 152064: all its products are whole waves of cuBLAS's tiles on 132 multiprocessors (`ops/slices.py`). 512 MiB
        is 8064 columns at best, which takes 2 % longer.
    keep_logits_bytes: probabilities that the forward keeps in bfloat16, so that the backward does not recompute their
        logits; 2 * rows * columns per call and shard saves one of the backward's three products entirely. They carry a
        relative error of up to 0.4 %. 0: everything is recomputed.
    """

    tile_bytes: int = 528 * 2**20
    keep_logits_bytes: int = 0


_current = Settings()


def settings() -> Settings:
    """The settings in force."""
    return _current


def configure(**changes: int) -> Settings:
    """Change fields of `Settings` for every later call in this process; returns what was in force before.

    Raises ValueError for a negative size or a tile of no bytes, TypeError for an unknown field.
    """
    global _current
    before, after = _current, dataclasses.replace(_current, **changes)
    if after.tile_bytes < 1 or after.keep_logits_bytes < 0:
        raise ValueError(
            f"tile_bytes={after.tile_bytes}, keep_logits_bytes={after.keep_logits_bytes}: expected a positive number "
            "of bytes and a number of bytes that is not negative."
        )
    _current = after
    return before

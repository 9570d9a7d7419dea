"""What the log-prob op may use of the device's memory; one setting for the process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_laser.logprob_memory import TILE_BYTES


@dataclass(frozen=True)
class Settings:
    """Bytes; they change speed, memory and rounding, not what is computed.

    tile_bytes: one tile of float32 logits. 528 MiB is 8448 columns of 16384 rows: wide enough that the products run
        at full speed and dX is read and written only 18 times for a vocabulary of 152064.
    keep_logits_bytes: probabilities that a call's forward may keep, so that its backward does not recompute their
        logits; 2 * rows * columns per call and shard saves one of the backward's three products entirely. They carry a
        relative error of up to 0.4 %. 0: everything is recomputed. None: chosen by `ops.memory`.
    min_block_rows: fewest rows of a block where the loss is worked inside blocks of rows (a number of rows): below
        that the products are small, and every block reads and writes all of dW.
    reserved_bytes: what others will yet allocate on the device; not given away where `keep_logits_bytes` is None.
    """

    tile_bytes: int = TILE_BYTES
    keep_logits_bytes: int | None = None
    min_block_rows: int = 1024
    reserved_bytes: int = 0


_current = Settings()


def settings() -> Settings:
    """The settings in force."""
    return _current


def configure(**changes: int | None) -> Settings:
    """Change fields of `Settings` for every later call in this process; returns what was in force before.

    Raises ValueError for a negative size or a tile of no bytes, TypeError for an unknown field.
    """
    global _current
    before, after = _current, dataclasses.replace(_current, **changes)  # type: ignore[arg-type]
    if (
        min(after.tile_bytes, after.min_block_rows) < 1
        or min(after.keep_logits_bytes or 0, after.reserved_bytes) < 0
    ):
        raise ValueError(
            f"tile_bytes={after.tile_bytes}, keep_logits_bytes={after.keep_logits_bytes}, "
            f"min_block_rows={after.min_block_rows}, reserved_bytes={after.reserved_bytes}: expected positive "
            "tile_bytes and min_block_rows, a number of bytes that is not negative or None, and one not negative."
        )
    _current = after
    return before

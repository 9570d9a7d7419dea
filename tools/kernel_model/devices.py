"""What the predictions are made for, and from: devices, shapes, and how long a byte and a launch take."""

from __future__ import annotations

from typing import NamedTuple

# Seconds between two kernels of a stream where the second is small or waits for the first.
LAUNCH = 3e-6


class Device(NamedTuple):
    """operations and bytes per second: of a bf16 product of 8192^3, hot, and of a copy."""

    name: str
    flops: float
    bytes: float
    multiprocessors: int = 132


# Rates that are reported for these cards; every run of `bench` measures its own.
DEVICES = (Device("H200", 790e12, 4.3e12), Device("H100", 798e12, 3.0e12))
# Time of forward and backward over three products that is asked for at 16384 x 5120 x 152064.
TARGETS = {"H200": 1.12, "H100": 1.14}


class Shape(NamedTuple):
    """One call on one rank: columns is this rank's shard."""

    rows: int
    hidden: int
    columns: int
    shards: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.hidden} x {self.columns}"


SHAPES = tuple(Shape(16384, hidden, 152064 // tp, tp) for hidden in (5120, 3584) for tp in (1, 8))
TARGET_SHAPE = SHAPES[0]
FEW_ROW_SHAPES = tuple(Shape(rows, 5120, 152064 // tp, tp) for tp in (1, 8) for rows in (16, 128))

"""From finished rollouts to micro-batches: flat arrays, the schedule, packing. Pure functions, numpy only."""

from megatron_laser.batching.context import context_shard
from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.batching.packing import PackedMicroBatch, PackInput, pack
from megatron_laser.batching.schedule import Schedule, build_schedule

__all__ = [
    "FlatBatch",
    "PackInput",
    "PackedMicroBatch",
    "Schedule",
    "build_schedule",
    "context_shard",
    "flatten",
    "pack",
]

"""The lines of a memory sum: what a rank holds on its GPU, and in host memory, and when.

`state` is always there; of the other phases one at a time is. `host` is host memory, apart from the GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_laser.errors import ConfigError
from megatron_laser.logprob_memory import GIB, MIB

STATE, UPDATE, STEP, SAVE, SYNC, GENERATE = "state", "update", "optimizer step", "save", "sync", "generate"
HOST = "host"
Device = Literal["cuda", "cpu"]  # what a rank trains on
PHASES = (UPDATE, STEP, SAVE, SYNC, GENERATE)

HEAD, KEPT = "log-prob head", "kept probabilities"


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part: `phase` is "state" (always there) or when it exists; `settings` change it."""

    name: str
    bytes: int
    phase: str
    detail: str
    settings: str


@dataclass(frozen=True, slots=True)
class MemorySum:
    """All lines of the fullest rank."""

    lines: tuple[MemoryLine, ...]

    def phase_bytes(self, phase: str) -> int:
        """Sum of the lines of one phase."""
        return sum(line.bytes for line in self.lines if line.phase == phase)

    @property
    def peak_phase(self) -> str:
        """The phase with the most memory."""
        return max(PHASES, key=self.phase_bytes)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment: the state and the largest phase, one at a time."""
        return self.phase_bytes(STATE) + self.phase_bytes(self.peak_phase)

    @property
    def host(self) -> int:
        """Bytes of page-locked host memory."""
        return self.phase_bytes(HOST)

    def check(self, gpu_bytes: float) -> None:
        """Raises ConfigError when the total is more than `gpu_bytes`; names the largest lines and their settings."""
        if self.total <= gpu_bytes:
            return
        there = [line for line in self.lines if line.phase in (STATE, self.peak_phase)]
        largest = sorted(there, key=lambda line: -line.bytes)[:3]
        raise ConfigError(
            [
                f"memory: a rank needs {gib(self.total)} ({self.peak_phase}) and the GPU has {gib(gpu_bytes)}. "
                "Largest: "
                + "; ".join(f"{line.name} {gib(line.bytes)} ({line.settings})" for line in largest)
            ]
        )


def gib(count: float) -> str:
    """Bytes in the unit that keeps three digits: GiB for models, MiB and KiB for toys."""
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"

"""SGLang's two checksums of a parameter, made of pieces of it in their order.

On a CPU a server takes the start of the SHA-256 of the bytes. On a GPU it mixes each 32-bit word with its position,
adds the words of a tile up, mixes the sums and adds the tiles up (`sglang/kernels/ops/memory/gpu_tensor_hash.py`,
0.5.23): sums ask for no order, so the same comes out of any partition into pieces, on any device.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

_MASK = 0xFFFFFFFF
_MIX1, _MIX2 = 0x85EBCA6B, 0xC2B2AE35
_POSITION1, _POSITION2 = 0x27D4EB2D, 0x165667B1
_SEED1 = 0x243F6A88
_SEED2 = ((_SEED1 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
_TILE = 8192  # words
_CHUNK = 512 * _TILE  # words at a time: a few buffers of 32 MiB


class ParameterHash(Protocol):
    """A checksum that grows."""

    def add(self, piece: torch.Tensor, at: int | None = None) -> None:
        """Values of the parameter, in row-major order: the next ones, or those from byte `at` on.

        A parameter is given in one of both ways, and every byte once.
        """

    def hexdigest(self) -> str:
        """16 hex digits."""


class Sha256:
    """As servers on CPUs have it."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._next = 0
        self._early: dict[int, memoryview] = {}  # what comes before its turn is kept until then

    def add(self, piece: torch.Tensor, at: int | None = None) -> None:
        # A copy, since torch never again resizes a storage that numpy has seen: the trainer's must be able to leave.
        data = piece.detach().to("cpu", copy=True).contiguous()
        self._early[self._next if at is None else at] = memoryview(data.reshape(-1).view(torch.uint8).numpy())
        while (turn := self._early.pop(self._next, None)) is not None:
            self._digest.update(turn)
            self._next += turn.nbytes

    def hexdigest(self) -> str:
        return self._digest.digest()[:8].hex()


class TileSums:
    """As servers on GPUs have it; computes where the pieces are."""

    def __init__(self) -> None:
        self._rest: torch.Tensor | None = None  # bytes of a word that the next piece completes
        self._words = 0  # of all that has come: the last one's place
        self._sums: list[tuple[int, torch.Tensor]] = []  # (first tile, [2, tiles] int64)

    def add(self, piece: torch.Tensor, at: int | None = None) -> None:
        data = piece.detach().contiguous().reshape(-1).view(torch.uint8)
        if at is not None:
            if at % 4 or len(data) % 4:
                raise ValueError(f"{len(data)} bytes from byte {at} on are no whole words of 4 bytes")
            data = data.clone() if data.storage_offset() % 4 else data
            self._add_words(data.view(torch.int32), at // 4)
            return
        if self._rest is not None:
            data = torch.cat([self._rest.to(data.device), data])
        whole = len(data) // 4 * 4
        self._rest = data[whole:].clone() if whole < len(data) else None
        if data.storage_offset() % 4:  # a word cannot begin there
            data = data.clone()
        self._add_words(data[:whole].view(torch.int32), self._words)

    def hexdigest(self) -> str:
        if self._rest is not None:
            self.add(torch.zeros(4 - len(self._rest), dtype=torch.uint8, device=self._rest.device))
        if not self._words:
            return f"{0:016x}"
        total = torch.zeros(2, -(-self._words // _TILE), dtype=torch.int64, device=self._sums[0][1].device)
        for first, sums in self._sums:
            total[:, first : first + sums.shape[1]] += sums
        mixed = _mix((total & _MASK) ^ (self._words * 4 & _MASK))
        return f"{_finish(int(((mixed[0] << 32) | mixed[1]).sum())):016x}"

    def _add_words(self, words: torch.Tensor, first: int) -> None:
        """words: [n] int32, the parameter's from `first` on."""
        for chunk in words.split(_CHUNK):
            value = chunk.to(torch.int64) & _MASK
            at = torch.arange(first, first + len(chunk), device=chunk.device) & _MASK
            before = first % _TILE
            after = -(before + len(chunk)) % _TILE
            sums = []
            for factor, seed, turn in ((_POSITION1, _SEED1, 15), (_POSITION2, _SEED2, 13)):
                place = ((at * factor + seed) & _MASK) ^ (((at << turn) & _MASK) | (at >> (32 - turn)))
                mixed = torch.nn.functional.pad(_mix(value ^ place), (before, after))
                sums.append(mixed.view(-1, _TILE).sum(1))
            self._sums.append((first // _TILE, torch.stack(sums)))
            first += len(chunk)
        self._words = max(self._words, first)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer, on [...] int64 of 32 bits; products wrap, and their low half is right."""
    x = ((x ^ (x >> 16)) * _MIX1) & _MASK
    x = ((x ^ (x >> 13)) * _MIX2) & _MASK
    return x ^ (x >> 16)


def _finish(x: int) -> int:
    """The mixing of splitmix64."""
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)

"""Numpy arrays and text from rank 0 to every rank, and the format that arrays travel and are kept in."""

from __future__ import annotations

import io
from collections.abc import Mapping
from os import PathLike
from typing import IO

import numpy as np
import torch
import torch.distributed as dist

from megatron_laser.distributed.runtime import Runtime


def broadcast_arrays(arrays: dict[str, np.ndarray] | None, runtime: Runtime) -> dict[str, np.ndarray]:
    """Send rank 0's named arrays to all ranks over gloo; `arrays` is ignored elsewhere. No pickling."""
    if runtime.world_size == 1:
        assert arrays is not None
        return arrays
    payload = _encode(arrays) if runtime.is_main and arrays is not None else None
    if runtime.leaders_group is not None:
        payload = _broadcast(payload, 0, runtime.leaders_group)
    if len(runtime.replica_ranks) > 1:
        payload = _broadcast(payload, runtime.replica_ranks[0], runtime.replica_group)
    assert payload is not None
    return _decode(payload)


def broadcast_text(text: str | None, runtime: Runtime) -> str:
    """Rank 0's words on every rank; `text` is ignored elsewhere."""
    own = None if text is None else {"text": np.frombuffer(text.encode(), dtype=np.uint8)}
    return bytes(broadcast_arrays(own, runtime)["text"]).decode()


def barrier(runtime: Runtime) -> None:
    """Return on every rank once every rank has called it."""
    if runtime.world_size > 1:
        dist.barrier(group=runtime.cpu_group)


def _broadcast(payload: torch.Tensor | None, source: int, group: dist.ProcessGroup) -> torch.Tensor:
    size = torch.tensor([0 if payload is None else payload.numel()], dtype=torch.int64)
    dist.broadcast(size, src=source, group=group)
    if payload is None:
        payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, src=source, group=group)
    return payload


def _encode(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    buffer = io.BytesIO()
    save_arrays(buffer, arrays)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _decode(payload: torch.Tensor) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(payload.numpy().tobytes()), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def save_arrays(file: str | PathLike[str] | IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays under their names.

    Raises:
        ValueError: one holds Python objects, which only pickle could store.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which are not written")
    # No options: before NumPy 2.2 savez has none, and takes each for one more array.
    np.savez(file, **arrays)  # type: ignore[arg-type]

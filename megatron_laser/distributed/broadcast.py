"""Numpy arrays and text from rank 0 to every rank, and the format that arrays travel and are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import IO

import numpy as np
import torch
import torch.distributed as dist

from megatron_laser.distributed.runtime import Runtime


def broadcast_arrays(arrays: dict[str, np.ndarray] | None, runtime: Runtime) -> dict[str, np.ndarray]:
    """Send rank 0's named arrays to all ranks over gloo; `arrays` is ignored elsewhere. No pickling.

    Each array is sent from where it lies and received where it stays: of the largest there is no second copy.

    Raises:
        ValueError: one holds Python objects, which only pickle could send.
    """
    if runtime.world_size == 1:
        assert arrays is not None
        return arrays
    own = arrays if runtime.is_main else None
    described = None if own is None else json.dumps(_describe(own)).encode()
    sent: dict[str, np.ndarray] = {}
    for name, dtype, shape in json.loads(_send_bytes(described, runtime)):
        if own is None:
            array = np.empty(shape, dtype=dtype)
        else:
            array = np.ascontiguousarray(own[name]).reshape(shape)  # a scalar would become a list of one
        if array.size:
            _send(torch.from_numpy(array.reshape(-1).view(np.uint8)), runtime)
        sent[name] = array
    return sent


def broadcast_text(text: str | None, runtime: Runtime) -> str:
    """Rank 0's words on every rank; `text` is ignored elsewhere."""
    if runtime.world_size == 1:
        assert text is not None
        return text
    return _send_bytes(text.encode() if runtime.is_main and text is not None else None, runtime).decode()


def barrier(runtime: Runtime) -> None:
    """Return on every rank once every rank has called it."""
    if runtime.world_size > 1:
        dist.barrier(group=runtime.cpu_group)


def _describe(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, str, tuple[int, ...]]]:
    _refuse_objects(arrays)
    return [(name, array.dtype.str, array.shape) for name, array in arrays.items()]


def _send_bytes(payload: bytes | None, runtime: Runtime) -> bytes:
    """Rank 0's bytes on every rank."""
    size = torch.tensor([0 if payload is None else len(payload)], dtype=torch.int64)
    _send(size, runtime)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if payload:
        buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    _send(buffer, runtime)
    return buffer.numpy().tobytes()


def _send(tensor: torch.Tensor, runtime: Runtime) -> None:
    """Rank 0's values into the tensor of every rank: to each replica's first rank, and from there to the others."""
    if runtime.leaders_group is not None:
        dist.broadcast(tensor, src=0, group=runtime.leaders_group)
    if len(runtime.replica_ranks) > 1:
        dist.broadcast(tensor, src=runtime.replica_ranks[0], group=runtime.replica_group)


def save_arrays(file: str | PathLike[str] | IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays under their names.

    Raises:
        ValueError: one holds Python objects, which only pickle could store.
    """
    _refuse_objects(arrays)
    # No options: before NumPy 2.2 savez has none, and takes each for one more array.
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _refuse_objects(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which are not written")

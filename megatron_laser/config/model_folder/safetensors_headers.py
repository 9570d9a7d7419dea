"""Which tensors lie where in a folder's safetensors files, read from their headers. No torch, no weights."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.errors import ModelFolderError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bits of one element; https://github.com/huggingface/safetensors, `Dtype`.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the format's limit, in bytes
_LFS = b"version https://git-lfs"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: as the format calls it: F32, BF16, F8_E4M3, ...
        shape: as stored.
        start: first byte of its data in the file. nbytes: length of its data.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def has_weight_files(folder: str | Path) -> bool:
    """Whether `folder` holds anything that should be weights; a recipe's folder has a config.json alone."""
    folder = Path(folder)
    return any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX)) or any(
        next(folder.glob(pattern), None) is not None for pattern in ("*.safetensors", "pytorch_model*")
    )


def read_stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """All tensors of `folder`'s `model.safetensors`, or of the files that its index names, in file order.

    Raises:
        ModelFolderError: there is no such file, one is no safetensors file or is cut off, or files and index disagree.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.is_file():
        if not os.path.lexists(single):
            raise ModelFolderError(f"model.path {folder}: {_what_is_there(folder)}")
        return read_header(single)
    weight_map = _read_index(index)
    files = list(dict.fromkeys(weight_map.values()))
    if os.path.lexists(single) and files != [WEIGHTS]:
        # transformers would read the single file, this package and SGLang's servers the index.
        raise ModelFolderError(
            f"{folder} has {WEIGHTS} and {INDEX}, which names other files: nobody can say which are the weights; "
            "remove the one that is old"
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ModelFolderError(
            f"{index} names {len(missing)} of {len(files)} files that are not there: {_some(missing)}; download them"
        )
    stored: dict[str, StoredTensor] = {}
    for name in files:
        for tensor, where in read_header(folder / name).items():
            if tensor in stored:
                raise ModelFolderError(
                    f"{folder}: tensor {tensor!r} is in {stored[tensor].file.name} and in {name}; download the folder "
                    "again"
                )
            stored[tensor] = where
    for tensor, name in weight_map.items():
        if tensor not in stored:
            raise ModelFolderError(f"{index} says that {tensor!r} is in {name}, which does not have it")
        if stored[tensor].file.name != Path(name).name:
            raise ModelFolderError(
                f"{index} says that {tensor!r} is in {name}, but it is in {stored[tensor].file.name}; download the "
                "index again"
            )
    return stored


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        ModelFolderError: it cannot be read, is no such file, or is shorter or longer than its header says.
    """
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(_LENGTH_BYTES)
            if (start + handle.read(len(_LFS))).startswith(_LFS):
                raise ModelFolderError(
                    f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
                )
            if size == 0:
                raise ModelFolderError(f"{file} is empty; download it again")
            length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else _LONGEST_HEADER + 1
            if length > _LONGEST_HEADER:
                raise ModelFolderError(f"{file} is no safetensors file; download it again")
            begin = _LENGTH_BYTES + length
            if begin > size:
                raise _cut_off(file, begin, size)
            handle.seek(_LENGTH_BYTES)
            header = handle.read(length)
    except OSError as error:
        raise ModelFolderError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        stored = _entries(file, json.loads(header), begin)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFolderError(
            f"{file} is no safetensors file: its header is broken; download it again"
        ) from error
    end = max((tensor.start + tensor.nbytes for tensor in stored.values()), default=begin)
    if end > size:
        raise _cut_off(file, end, size)
    if end < size:
        raise ModelFolderError(
            f"{file} has {size:,} bytes, its header describes {end:,}: it is damaged; download it again"
        )
    return stored


def _entries(file: Path, header: Any, begin: int) -> dict[str, StoredTensor]:
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        bits = _BITS.get(entry["dtype"])
        if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
            raise ValueError(name)
        if bits is not None and (last - first) * 8 != math.prod(shape) * bits:
            raise ValueError(name)
        found.append(
            (first, last, name, StoredTensor(file, str(entry["dtype"]), shape, begin + first, last - first))
        )
    found.sort(key=lambda item: item[:2])
    expected = 0
    for first, last, name, _ in found:  # the format leaves no gaps
        if first != expected:
            raise ValueError(name)
        expected = last
    return {name: tensor for _, _, name, tensor in found}


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{index} cannot be read as JSON: {error}; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelFolderError(f"{index} has no weight_map from tensors to files; download it again")
    return weight_map


def _what_is_there(folder: Path) -> str:
    """Why there are no weights to read, in words."""
    missing = f"neither {WEIGHTS} nor {INDEX} is there"
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        return f"{missing}, though {_some(shards)} is; download the index"
    if any(folder.glob("pytorch_model*")):
        return (
            f"{missing}, only pytorch_model files, which are not read: load the folder with transformers and save it "
            "again with save_pretrained"
        )
    return f"{missing}; download the weights"


def _cut_off(file: Path, expected: int, size: int) -> ModelFolderError:
    return ModelFolderError(
        f"{file} is cut off: it has {size:,} bytes and its header asks for {expected:,}; download it again"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""Reading and writing Hugging Face folders of safetensors, a tensor (or a part of one) at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_laser.algorithms.numerics import is_finite
from megatron_laser.config import Architecture, ModelFolderError
from megatron_laser.config.model_folder.safetensors_headers import INDEX, WEIGHTS, read_stored_tensors
from megatron_laser.config.model_folder.weight_checks import refuse, weight_problems
from megatron_laser.files import replace_folder, take_mode, through_links

# What belongs to a model besides its weights: configuration, tokenizer, chat template, licence.
_COPIED = (
    *("config.json", "generation_config.json", "chat_template*", "LICENSE*", "NOTICE*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken"),
)
MAX_SHARD_BYTES = 4 * 2**30


class HfFolder:
    """The tensors of a local Hugging Face folder (`model.safetensors`, whole or with an index).

    A `TensorReader`: slices are read from the memory-mapped file, nothing else is loaded. What is read is looked
    through for NaN and infinity, about 0.1 s a GiB on one core.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the headers of all files.

        Raises ModelFolderError when one is missing, cut off, or not what the index says.
        """
        self.path = Path(path)
        self.stored = read_stored_tensors(self.path)
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def require(self, architecture: Architecture) -> None:
        """Raises ModelFolderError when these are not the weights of `architecture`, all of them and nothing else."""
        refuse(weight_problems(self.path, self.stored, architecture))

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelFolderError(f"{file} cannot be read: {error}") from error
            self._files[file] = self._stack.enter_context(handle)
        return self._files[file]

    def _slice(self, name: str) -> Any:
        if name not in self.stored:
            raise ModelFolderError(f"{self.path}: tensor {name!r} is missing from its safetensors files")
        return self._open(self.stored[name].file).get_slice(name)

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_finite(tensor):
            raise ModelFolderError(
                f"{self.stored[name].file}: tensor {name!r} holds NaN or infinity; use weights from before that, or "
                "download the file again"
            )
        return tensor

    def names(self) -> list[str]:
        """All tensor names, in file order."""
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the file's header."""
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """tensor[start:stop]"""
        return self._finite(name, self._slice(name)[start:stop])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """tensor[:, start:stop]"""
        return self._finite(name, self._slice(name)[:, start:stop])

    def full(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        return self._finite(name, self._slice(name)[:])

    def close(self) -> None:
        """Unmap the files."""
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_hf_folder(
    weights: Iterable[tuple[str, torch.Tensor]],
    target: Path,
    *,
    source: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    cast: bool = True,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; published by one rename.

    Configuration, tokenizer, chat template and licence are copied from `source`. At most one shard of
    `max_shard_bytes` is held in memory. An existing `target` is replaced only once the new one is complete; where
    it is a link, the folder that it points to is.

    Args:
        dtype: of config.json, and of the tensors, if `cast`; else they stay as they come.

    Raises:
        OSError: it cannot be written, for want of space or permission; what was written of it is deleted.
    """
    real = through_links(target)
    partial = real.with_name(real.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(partial, weights, source, dtype, max_shard_bytes, cast)
        replace_folder(partial, real, aside=real.with_name(real.name + ".old"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk its bytes are what a checkpoint needs
    return target


def _fill(
    partial: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    source: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    cast: bool,
) -> None:
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _COPIED):
            shutil.copyfile(file, partial / file.name)
    config_file = partial / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    shards: list[list[str]] = []
    total = 0
    for shard in _shards(weights, dtype if cast else None, max_shard_bytes):
        file = partial / f"shard-{len(shards)}"
        try:
            save_file(shard, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from error
        take_mode(file, like=config_file)
        total += sum(tensor.nbytes for tensor in shard.values())
        shards.append(list(shard))
    if len(shards) == 1:
        os.replace(partial / "shard-0", partial / WEIGHTS)
    else:
        weight_map = {}
        for number, names in enumerate(shards):
            shard_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            os.replace(partial / f"shard-{number}", partial / shard_name)
            weight_map.update(dict.fromkeys(names, shard_name))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, limit: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        tensor = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard

"""Between a checkpoint folder and a Hugging Face folder, in one process without process groups or a model.

The checkpoint's tensors already lie under their Hugging Face names (`sharded_state.py`), so no layout has to be
undone: whole tensors are read from one side and written to the other, one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_laser.algorithms.numerics import is_finite
from megatron_laser.model.hf_config import architecture_of, read_hf_config
from megatron_laser.model.hf_folder import MAX_SHARD_BYTES, HfFolder, write_hf_folder
from megatron_laser.model.mapping import Geometry, Vocabulary, rules
from megatron_laser.model.platform import DTYPES
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint import torch_dist
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.identity import differences, model_identity
from megatron_laser.trainer.checkpoint.sharded_state import WEIGHTS

# (bytes done, bytes in all) after each tensor
Progress = Callable[[int, int], None]


def checkpoint_to_hf(
    source: Path,
    target: Path,
    *,
    model: Path,
    verify: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    replace: bool = False,
) -> Path:
    """Write the weights of checkpoint `source` as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Memory: one safetensors file of `max_shard_bytes`. `target` appears when it is complete.

    Args:
        source: a published checkpoint, `.../step_00000120`, of any parallel layout.
        target: a new folder; with `replace` one that is there is replaced once the new one is complete.
        model: the Hugging Face folder that the run started from; configuration and tokenizer come from it.
        verify: compare the checkpoint's files with their checksums first.

    Raises:
        CheckpointError: `source` is damaged, not complete, or of another model than `model`; `target` exists.
    """
    if not replace:
        _refuse_existing(target)
    state = folders.read_state(source)
    dtype = DTYPES[state["model"]["dtype"]]
    config = read_hf_config(model)
    found = differences(state["model"], model_identity(config, _geometry(config), dtype))
    if found:
        raise CheckpointError(
            f"checkpoint {source} is of another model than {model}: {found}; name the folder that the run "
            "started from"
        )
    if verify:
        folders.verify(source)
    stored = _Stored(source)
    real_rows = _vocabulary_rows(config)
    names = list(real_rows)
    total = sum(stored.bytes(name) for name in names)
    if unused := [name for name in stored.names() if name not in real_rows]:
        raise CheckpointError(
            f"checkpoint {source}: {len(unused)} tensors that a model of {model} has no use for "
            f"({', '.join(unused[:3])}); name the folder that the run started from"
        )

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name in names:
            tensor = stored.read(name)
            rows = real_rows[name]
            yield name, tensor if rows is None else tensor[:rows]
            done += stored.bytes(name)
            if progress is not None:
                progress(done, total)

    target.parent.mkdir(parents=True, exist_ok=True)
    return write_hf_folder(weights(), target, source=model, dtype=dtype, max_shard_bytes=max_shard_bytes)


def hf_to_checkpoint(
    source: Path, root: Path, *, dtype: torch.dtype, progress: Progress | None = None
) -> Path:
    """Write Hugging Face folder `source` as checkpoint of step 0 in `root`, which a run can resume from.

    The optimizer's moments are zero and the data starts at its beginning: training from it is training from
    `source`, with the same first step. Memory: one tensor. Returns the published folder.

    Args:
        root: the run's checkpoint folder, `output_dir`/checkpoints; it must not hold a checkpoint yet.
        dtype: the run's `model.dtype`.

    Raises:
        CheckpointError: `root` holds a checkpoint already.
        ModelFolderError: config.json and weights of `source` disagree, or a tensor holds NaN or infinity.
    """
    existing = folders.published(root)
    if existing:
        raise CheckpointError(
            f"{root} already holds {existing[-1][1].name}, which a run there would resume from; choose another "
            "folder"
        )
    config = read_hf_config(source)
    geometry = _geometry(config)
    partial = folders.partial_folder(root, 0)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with HfFolder(source) as reader:
            reader.require(architecture_of(config))
            tensors = _Tensors(reader, list(_vocabulary_rows(config)), dtype, progress)
            torch_dist.write_one_by_one(tensors.placeholders(), tensors.make, partial)
        folders.sync_files(path for path in partial.iterdir() if path.is_file())
        state = {
            "step": 0,
            "optimizer_step": 0,
            "scheduler": {"num_steps": 0},
            "model": model_identity(config, geometry, dtype),
            "world_size": 0,  # no rank's random states are stored: a run takes those of its seed
            "run": None,
        }
        return folders.publish(partial, state, folders.digests(partial, ""))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Stored:
    """The weights of a checkpoint, read one whole tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = torch_dist.Reader(folder)
        self._tensors = self._reader.tensors()

    def _entry(self, name: str) -> tuple[torch.Size, torch.dtype]:
        if f"{WEIGHTS}.{name}" not in self._tensors:
            raise CheckpointError(f"checkpoint {self._folder}: tensor {name!r} is missing from it")
        return self._tensors[f"{WEIGHTS}.{name}"]

    def names(self) -> list[str]:
        return [key.removeprefix(f"{WEIGHTS}.") for key in self._tensors if key.startswith(f"{WEIGHTS}.")]

    def bytes(self, name: str) -> int:
        shape, dtype = self._entry(name)
        return int(shape.numel() * dtype.itemsize)

    def read(self, name: str) -> torch.Tensor:
        shape, dtype = self._entry(name)
        tensor = torch.empty(shape, dtype=dtype)
        self._reader.read_into(f"{WEIGHTS}.{name}", tensor)
        if not is_finite(tensor):
            raise CheckpointError(
                f"checkpoint {self._folder}: tensor {name!r} holds NaN or infinity; convert an earlier checkpoint"
            )
        return tensor


class _Tensors:
    """Everything that a checkpoint of a Hugging Face folder holds, made when it is asked for."""

    def __init__(
        self, reader: HfFolder, names: list[str], dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self._reader, self._dtype, self._progress = reader, dtype, progress
        kinds = [optimizer_state.EXP_AVG, optimizer_state.EXP_AVG_SQ]
        if dtype == torch.bfloat16:  # fp32 training updates the weights themselves
            kinds.append(optimizer_state.MAIN)
        prefixes = {WEIGHTS: dtype} | {f"optimizer.{kind}": torch.float32 for kind in kinds}
        self._entries = {
            f"{prefix}.{name}": (prefix, name, stored)
            for name in names
            for prefix, stored in prefixes.items()
        }
        self._done = 0
        self._total = sum(tensor.nbytes for tensor in self.placeholders().values())

    def placeholders(self) -> dict[str, torch.Tensor]:
        """Tensors of the right shape and type that take no memory."""
        return {
            key: torch.zeros((), dtype=stored).expand(self._reader.shape(name))
            for key, (_, name, stored) in self._entries.items()
        }

    def make(self, key: str) -> torch.Tensor:
        """The tensor stored under `key`."""
        prefix, name, stored = self._entries[key]
        if prefix in (WEIGHTS, f"optimizer.{optimizer_state.MAIN}"):
            # The main copy is of the rounded weights, as it is where a run starts from the folder itself.
            tensor = self._reader.full(name).to(self._dtype).to(stored).contiguous()
        else:
            tensor = torch.zeros(self._reader.shape(name), dtype=stored)
        self._done += tensor.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
        return tensor


def _geometry(config: PretrainedConfig) -> Geometry:
    return Geometry.of(config, tensor=1, vocab_multiple=1)


def _vocabulary_rows(config: PretrainedConfig) -> dict[str, int | None]:
    """Every exported tensor's name, in order -> rows without padding, None where there is no padding."""
    return {
        name: config.vocab_size if isinstance(rule.layout, Vocabulary) else None
        for rule in rules(config)
        if rule.exported
        for name in rule.hf
    }


def _refuse_existing(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} already exists; name a new folder, or delete it first")

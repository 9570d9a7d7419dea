"""`megatron-laser convert`: which way, from where, and with a progress bar; the work is `checkpoint.convert`'s."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from megatron_laser.config import ConfigError, check_model_folder, read_architecture
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.model.platform import DTYPES
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from megatron_laser.trainer.checkpoint.folder import CheckpointError

_STEP_FOLDER = re.compile(r"step_\d{8}")


def convert(
    source: Path,
    target: Path,
    *,
    model: Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
    console: Console | None = None,
) -> Path:
    """Convert a checkpoint's step folder to a Hugging Face folder, or the other way round; returns what it wrote.

    Args:
        model: to Hugging Face only: the folder the run started from; None: `model.path` of the config.yaml
            beside the checkpoints.
        dtype: to a checkpoint only: the run's `model.dtype`; None: that of the folder's config.json.
        verify: to Hugging Face only: compare the checkpoint's files with their checksums first.
        console: where the progress bar is drawn, when it is a terminal.

    Raises:
        CheckpointError, ConfigError: the message says what is wrong with the folders and what to do.
    """
    with _bar(console or Console(stderr=True)) as bar, _writing(target):
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if _is_checkpoint(source):
            if dtype is not None:
                raise ConfigError(
                    [
                        f"--dtype {dtype} goes with the way to a checkpoint; {source} is a checkpoint and keeps its own"
                    ]
                )
            model = model or _initial_model(source)
            read_architecture(model)
            return checkpoint_to_hf(source, target, model=model, verify=verify, progress=progress)
        _check_hf_folder(source)
        if model is not None:
            raise ConfigError(
                [f"--model {model} goes with the way from a checkpoint; {source} is a model already"]
            )
        root = target.parent if _STEP_FOLDER.fullmatch(target.name) else target
        if target != root and target.name != folders.partial_folder(root, 0).stem:
            raise CheckpointError(
                f"{target}: a converted model is step 0; name {root}, or step_00000000 in it"
            )
        check_model_folder(source)
        return hf_to_checkpoint(source, root, dtype=DTYPES[dtype or _stated_dtype(source)], progress=progress)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{target} is not complete: {error}") from error


def _bar(console: Console) -> Progress:
    columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _is_checkpoint(source: Path) -> bool:
    if (source / "state.json").is_file() and (source / ".metadata").is_file():
        return True
    steps = folders.published(source)
    if steps:
        raise CheckpointError(
            f"{source} holds {len(steps)} checkpoints; name one of them, for example {steps[-1][1]}"
        )
    return False


def _check_hf_folder(source: Path) -> None:
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} is neither a checkpoint's step folder (state.json, .metadata) nor a Hugging Face folder "
            "(config.json, *.safetensors)"
        )


def _initial_model(source: Path) -> Path:
    """`model.path` of the run that the checkpoint lies in: `output_dir`/checkpoints/step_..."""
    file = source.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is not there, so the model that the run started from is unknown; name its folder with --model"
        )
    path = Path(str((read_yaml(file).data.get("model") or {}).get("path")))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}, the model.path of {file}, has no config.json any more; name the Hugging Face folder that the "
            "run started from with --model"
        )
    return path


def _stated_dtype(source: Path) -> str:
    """The weights' type by config.json; transformers 4 called it torch_dtype."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    stated = raw.get("dtype", raw.get("torch_dtype"))
    if stated not in DTYPES:
        raise ConfigError(
            [
                f"{source}/config.json says dtype {stated!r}; name the run's model.dtype with --dtype "
                f"({' or '.join(DTYPES)})"
            ]
        )
    return str(stated)

"""The trained model as Hugging Face folders: at the end, every n steps, and of the best checkpoint."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import UserError
from megatron_laser.files import remove
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.model.platform import DTYPES
from megatron_laser.observability import events
from megatron_laser.rollout.engine import StoppedEarly
from megatron_laser.run.engines import STOPPED
from megatron_laser.run.stop_signals import StopSignals
from megatron_laser.trainer.checkpoint.best import HF_BEST, best_folder, read_best
from megatron_laser.trainer.checkpoint.convert import checkpoint_to_hf
from megatron_laser.trainer.checkpoint.folder import checkpoint_root
from megatron_laser.weight_sync import sync_weights

logger = logging.getLogger(__name__)

FINAL = "hf"
_OF_A_STEP = re.compile(r"hf_step_(\d+)")


def export_hf(
    config: RunConfig,
    stream: Iterator[tuple[str, torch.Tensor]],
    signals: StopSignals,
    *,
    is_main: bool,
    step: int,
    name: str = FINAL,
) -> str:
    """Write `output_dir`/NAME on rank 0; the other ranks take part in the stream's collectives.

    Args:
        step: whose weights they are.

    Returns:
        "", or on rank 0 why the folder is not written, a stop (`STOPPED`) among other reasons; the stream has then
        been run to its end all the same.
    """
    if not is_main:
        sync_weights(stream, None, version=step)
        return ""
    target = Path(config.run.output_dir) / name
    stream = iter(stream)

    def until_stopped() -> Iterator[tuple[str, torch.Tensor]]:
        for item in stream:
            if signals.reason:
                raise StoppedEarly(signals.reason)
            yield item

    try:
        write_hf_folder(
            until_stopped(), target, source=Path(config.model.path), dtype=DTYPES[config.model.dtype]
        )
    except StoppedEarly as stop:
        deque(stream, maxlen=0)
        return f"{STOPPED}{stop}"
    except OSError as error:
        deque(stream, maxlen=0)
        trouble = f"{target} cannot be written: {error}"
        logger.error("%s", trouble)
        return trouble
    if name != FINAL:
        events.note("checkpoint", f"exported {name}", step)
        _retain(Path(config.run.output_dir), config.checkpoint.export_keep, step)
    return ""


def export_name(config: RunConfig, step: int) -> str:
    """The folder in `output_dir` that is due after `step` by `checkpoint.export_every`, "" where none is."""
    every = config.checkpoint.export_every
    return f"hf_step_{step}" if every and step > 0 and step % every == 0 else ""


def is_exported(config: RunConfig, name: str) -> bool:
    """Whether that folder is there."""
    return (Path(config.run.output_dir) / name / "config.json").is_file()


def export_best(config: RunConfig) -> None:
    """Write the checkpoint that best.json names as `output_dir`/hf_best, on rank 0; a failure is said, and that is all.

    It is converted as `megatron-laser convert` does, tensor by tensor.
    """
    output, root = Path(config.run.output_dir), checkpoint_root(config)
    best = read_best(output)
    if best is None or config.checkpoint.best.metric is None or not config.checkpoint.export_hf:
        return
    try:
        checkpoint_to_hf(
            best_folder(root, best),
            output / HF_BEST,
            model=Path(config.model.path),
            verify=config.checkpoint.verify,
            replace=True,
        )
    except (OSError, UserError) as error:
        logger.error(
            "%s cannot be written: %s; `megatron-laser convert %s FOLDER` does the same",
            *(output / HF_BEST, error, best_folder(root, best)),
        )


def _retain(output: Path, keep: int | None, step: int) -> None:
    """Delete all but the newest `keep` of the folders of steps up to `step`; later ones will be written again."""
    if keep is None:
        return
    found = sorted(
        (int(match[1]), path)
        for path in output.iterdir()
        if (match := _OF_A_STEP.fullmatch(path.name)) and int(match[1]) <= step
    )
    for _, path in found[:-keep]:
        try:
            remove(path)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error)

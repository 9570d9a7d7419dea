"""The trained model as a Hugging Face folder at the end of a run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.model.platform import DTYPES
from megatron_laser.rollout.engine import StoppedEarly
from megatron_laser.run.engines import STOPPED
from megatron_laser.run.stop_signals import StopSignals
from megatron_laser.weight_sync import sync_weights

logger = logging.getLogger(__name__)


def export_hf(
    config: RunConfig, stream: Iterator[tuple[str, torch.Tensor]], signals: StopSignals, *, is_main: bool
) -> str:
    """Write `output_dir`/hf on rank 0; the other ranks take part in the stream's collectives.

    Returns:
        "", or on rank 0 why the folder is not written, a stop (`STOPPED`) among other reasons; the stream has then
        been run to its end all the same.
    """
    if not is_main:
        sync_weights(stream, None, version=config.run.steps)
        return ""
    target = Path(config.run.output_dir) / "hf"
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
    return ""

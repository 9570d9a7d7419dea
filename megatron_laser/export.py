"""The trained model as a Hugging Face folder at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_laser.config.schema import RunConfig
from megatron_laser.model.dtypes import DTYPES
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.weight_sync import sync_weights


def export_hf(config: RunConfig, stream: Iterator[tuple[str, torch.Tensor]], *, is_main: bool) -> None:
    """Write `output_dir`/hf on rank 0; the other ranks take part in the stream's collectives."""
    if not is_main:
        sync_weights(stream, None, version=config.run.steps)
        return
    write_hf_folder(
        stream,
        Path(config.run.output_dir) / "hf",
        source=Path(config.model.path),
        dtype=DTYPES[config.model.dtype],
    )

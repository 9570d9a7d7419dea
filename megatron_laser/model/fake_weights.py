"""Random weights of the shape of a config.json (`run.fake.weights`), read like those of a folder."""

from __future__ import annotations

import math
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_laser.config import Architecture, ModelFolderError, RunConfig, read_architecture
from megatron_laser.config.model_folder.parameters import tensor_shapes
from megatron_laser.model.hf_folder import HfFolder

_DRAWN = 1_000_003  # numbers, which are repeated: gigabytes of them would take minutes to draw
_SCALE = 0.02  # as models are initialised


class FakeFolder(HfFolder):
    """Every tensor of an architecture, made up where it is asked for; all ranks make up the same."""

    def __init__(self, path: str | Path) -> None:
        """Only config.json is read. Raises ConfigError where it describes no model."""
        self.path, self.stored = Path(path), {}
        self._files, self._stack = {}, ExitStack()
        self._shapes = tensor_shapes(read_architecture(path))
        generator = torch.Generator().manual_seed(1)
        self._drawn = (torch.randn(_DRAWN, generator=generator) * _SCALE).bfloat16()

    def require(self, architecture: Architecture) -> None:
        """See `HfFolder.require`."""
        if tensor_shapes(architecture) != self._shapes:
            raise ModelFolderError(f"{self.path}: the weights were made up for another config.json")

    def names(self) -> list[str]:
        """See `HfFolder.names`."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `HfFolder.shape`."""
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `HfFolder.rows`; without making up the rows before."""
        shape = self._shapes[name]
        stop = min(stop, shape[0])
        width = math.prod(shape[1:])
        return self._numbers(name, start * width, (stop - start) * width).view(stop - start, *shape[1:])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `HfFolder.columns`."""
        return self.full(name)[:, start:stop]

    def full(self, name: str) -> torch.Tensor:
        """See `HfFolder.full`."""
        return self.rows(name, 0, self._shapes[name][0])

    def _numbers(self, name: str, first: int, count: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(count, dtype=torch.bfloat16)
        shift = (zlib.crc32(name.encode()) + first) % _DRAWN
        return self._drawn.repeat(-(-(shift + count) // _DRAWN))[shift : shift + count].clone()


def open_weights(config: RunConfig) -> HfFolder:
    """The weights that the run's model begins with."""
    return FakeFolder(config.model.path) if config.run.fake.weights else HfFolder(config.model.path)

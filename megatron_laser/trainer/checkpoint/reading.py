"""Reading single tensors of a checkpoint, in one process and without collectives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_laser.errors import UserError
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.together import reason


class IndexedReader(dcp.FileSystemReader):
    """Reads the checkpoint's index once: one with thousands of tensors takes a while."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; the same object each time."""
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


@contextmanager
def without_collectives() -> Iterator[None]:
    """torch warns that it reads or writes without collectives, and its error is no `Exception`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            inner = next(iter(error.failures.values()))[0]
            if isinstance(inner, UserError):
                raise inner from error
            raise CheckpointError(reason(inner)) from error

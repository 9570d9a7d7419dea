"""Tensors on their way to all servers, sent by a thread of their own.

A collective returns at once, but for the first one of a communicator: NCCL then connects all ranks, which takes as
long as it takes and, when a server is gone, does not end. The training loop must be able to give up on that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_laser.model import platform


class Broadcast:
    """One or more broadcasts, in order; `tensors` live until this object is gone."""

    def __init__(self, send: Callable[[torch.Tensor], dist.Work], tensors: Sequence[torch.Tensor]) -> None:
        """Args: send: starts one of them."""
        self._tensors = list(tensors)
        self._works: list[dist.Work] = []
        self._error: BaseException | None = None
        self._issued = threading.Event()
        device = tensors[0].device.index if tensors else None

        def issue() -> None:
            try:
                if device is not None:
                    platform.set_local_device(device)  # a new thread has the first one
                for tensor in self._tensors:
                    self._works.append(send(tensor))
            except BaseException as error:
                self._error = error
            self._issued.set()

        # A daemon: one that never comes back must not keep the process from ending.
        threading.Thread(target=issue, name="weight broadcast", daemon=True).start()

    @property
    def issued(self) -> bool:
        """Whether the collectives have been started, so that the group's communicator is connected."""
        return self._issued.is_set()

    def done(self) -> bool:
        """Whether every server has everything. Raises RuntimeError when a broadcast failed."""
        if not self.issued:
            return False
        if self._error is not None:
            raise RuntimeError(str(self._error) or repr(self._error)) from self._error
        if not all(work.is_completed() for work in self._works):
            return False
        for work in self._works:
            work.wait()  # raises what went wrong on the device
        return True

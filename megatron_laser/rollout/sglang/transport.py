"""What an engine needs of whoever moves weights to its servers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_laser.rollout.sglang.engine import SglangEngine


class WeightTransport(Protocol):
    """Moves one stream of weights to all servers; see `megatron_laser.weight_sync`."""

    def send(
        self, engine: SglangEngine, weights: Iterable[tuple[str, torch.Tensor]], version: int, label: str
    ) -> None:
        """Give every server that can be updated these weights under the name `label`."""
        ...

    def close(self) -> None:
        """Leave process groups, delete files; safe to call twice."""
        ...

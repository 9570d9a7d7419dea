"""Tiles of float32 logits from the vendor's matrix product, reduced and differentiated by Triton kernels."""

from __future__ import annotations

import torch

from megatron_laser.ops.autograd import Upstream
from megatron_laser.ops.kept import TILE_BYTES
from megatron_laser.ops.settings import settings
from megatron_laser.ops.tiled_engine import Keep, RunningStatistics, TiledEngine
from megatron_laser.ops.triton import tile_kernels

# Fewest columns of a tile: below that the products are narrow; then the rows are cut instead.
MIN_COLUMNS = 2048


class TritonTiles:
    """`TileFunctions` in Triton."""

    def __init__(self, block: int) -> None:
        """`block`: columns that one program of a kernel handles at a time."""
        self._block = block

    def statistics(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        state: RunningStatistics,
        first_column: int,
        keep: Keep | None,
    ) -> None:
        """See `TileFunctions`."""
        tile_kernels.launch_statistics(z, labels, inv_temperature, state, first_column, keep, self._block)

    def gradient(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        inv_temperature: torch.Tensor,
        upstream: Upstream,
        out: torch.Tensor,
        first_column: int,
        base: torch.Tensor | None,
    ) -> None:
        """See `TileFunctions`."""
        tile_kernels.launch_gradient(
            z, labels, inv_temperature, upstream, out, first_column, base, self._block
        )

    def kept_dtype(self, like: torch.Tensor) -> torch.dtype | None:
        """See `TileFunctions`."""
        return None if like.dtype == torch.float16 else like.dtype


class ChunkedEngine(TiledEngine):
    """`TiledEngine` on CUDA, or in Triton's interpreter."""

    def __init__(
        self,
        block: int = tile_kernels.BLOCK,
        min_columns: int = MIN_COLUMNS,
        kept_tile_bytes: int = TILE_BYTES,
    ) -> None:
        """`block`: see `TritonTiles`; else see `TiledEngine`."""
        super().__init__(
            TritonTiles(block),
            tile_bytes=settings().tile_bytes,
            min_columns=min_columns,
            kept_tile_bytes=kept_tile_bytes,
        )

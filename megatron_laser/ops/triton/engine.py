"""Tiles of float32 logits from the vendor's matrix product, reduced and differentiated by Triton kernels."""

from __future__ import annotations

from megatron_laser.logprob_memory import KEPT_TILE_BYTES
from megatron_laser.ops.settings import settings
from megatron_laser.ops.tiled_engine import TiledEngine
from megatron_laser.ops.triton.tile_kernels import BLOCK, TritonTiles

# Fewest columns of a tile: below that the products are narrow; then the rows are cut instead.
MIN_COLUMNS = 2048


class ChunkedEngine(TiledEngine):
    """`TiledEngine` on CUDA, or in Triton's interpreter."""

    def __init__(
        self,
        block: int = BLOCK,
        min_columns: int = MIN_COLUMNS,
        kept_tile_bytes: int = KEPT_TILE_BYTES,
    ) -> None:
        """`block`: see `TritonTiles`; else see `TiledEngine`."""
        super().__init__(
            TritonTiles(block),
            tile_bytes=settings().tile_bytes,
            min_columns=min_columns,
            kept_tile_bytes=kept_tile_bytes,
        )

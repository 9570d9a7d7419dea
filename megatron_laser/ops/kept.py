"""Probabilities that a forward keeps for its backward, so that the logits are not multiplied a second time.

A row's P_j = exp(z_j - base), with one base for all of its columns: its largest scaled logit in the first slice of the
shard, and a margin. The gradient of its logits is then a row factor times P, but for the label's entry, which is put
in place from the exact log-prob (for a confident token, 1 - p would be nothing but rounding):

    dz_j = c P_j,  c = -g exp(base - lse),  P_label = exp(lse - base) expm1(logprob)
    dX = c (P W),  dW = P^T (c X)

so both products take P as it lies in memory, whatever the upstream gradient is. P is in bfloat16 for bfloat16 inputs
(rounded to at most 0.4 %, relative, whatever its size), else in their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_laser.logprob_memory import KEPT_TILE_BYTES
from megatron_laser.ops.slices import group_slices
from megatron_laser.ops.tiles import local_labels, padded

# A base above the first slice's maximum leaves room for the maxima of later ones, on both sides of 1.
MARGIN = 20.0
# exp(lse - base) beyond this would cost c or P its digits: the call recomputes.
LARGEST_SHIFT = 50.0


def kept_dtype(operand: torch.dtype) -> torch.dtype | None:
    """What probabilities are kept in, given the products' operands; None: they are not (float16: too few exponents)."""
    return None if operand == torch.float16 else operand


class Kept:
    """Tiles of P [rows, columns] for the first columns of the shard, and what turns them into a gradient."""

    def __init__(
        self,
        slices: Sequence[slice],
        rows: int,
        sums_like: torch.Tensor,
        dtype: torch.dtype | None,
        *,
        keep_bytes: int,
        tile_bytes: int = KEPT_TILE_BYTES,
    ) -> None:
        """Nothing is allocated yet.

        Args:
            slices: of the shard's columns, as the forward will go over them; the first that fit are kept.
            sums_like: any tensor of the accumulation dtype, on the device.
            dtype: of P; None: nothing is kept.
        """
        self.base = sums_like.new_empty(rows)
        self.largest_shift = self.base.new_zeros(())
        self._dtype = dtype
        self._chosen: torch.Tensor | None = None
        self._tiles: list[tuple[slice, torch.Tensor]] = []
        self._groups = self._grouped(slices, rows, keep_bytes, tile_bytes)

    def _grouped(
        self, slices: Sequence[slice], rows: int, keep_bytes: int, tile_bytes: int
    ) -> dict[int, slice]:
        """First column of a tile to all of its columns: as even as possible, none beyond `tile_bytes`."""
        if self._dtype is None or not rows:
            return {}
        column_bytes = rows * self._dtype.itemsize
        fitting = [one for one in slices if padded(one.stop) * column_bytes <= keep_bytes]
        if not fitting:
            return {}
        widths = [one.stop - one.start for one in fitting]
        found = group_slices(widths, max(1, tile_bytes // column_bytes))
        return {
            fitting[group.start].start: slice(fitting[group.start].start, fitting[group.stop - 1].stop)
            for group in found
        }

    def room_for(self, columns: slice) -> torch.Tensor | None:
        """Where P [rows, columns] of this slice is to be written; None where it is not kept.

        Ask in the order of the columns. Raises torch.OutOfMemoryError.
        """
        group = self._groups.get(columns.start)
        if group is not None:
            width = padded(group.stop - group.start)
            tile = torch.empty(len(self.base), width, dtype=self._dtype, device=self.base.device)
            self._tiles.append((group, tile))
        if not self._tiles or columns.stop > self.columns:
            return None
        group, tile = self._tiles[-1]
        return tile[:, columns.start - group.start : columns.stop - group.start]

    def stop(self) -> None:
        """Keep no further columns."""
        self._groups = {}

    @property
    def columns(self) -> int:
        """The first columns of the shard that are kept."""
        return self._tiles[-1][0].stop if self._tiles else 0

    @property
    def nbytes(self) -> int:
        """Memory of the tiles."""
        return sum(tile.nbytes for _, tile in self._tiles)

    def compare(self, lse: torch.Tensor) -> None:
        """Note how far lse [rows] of the whole vocabulary is above the bases; the device is not waited for."""
        if len(lse):
            self.largest_shift = (lse - self.base).amax()

    @staticmethod
    def holds(largest_shift: float) -> bool:
        """Whether P and c have all their digits; False for NaN."""
        return largest_shift <= LARGEST_SHIFT

    def choose(self, rows: torch.Tensor) -> None:
        """From now on only the rows at this index [m]: tiles are cut when they are taken."""
        self._chosen, self.base = rows, self.base[rows]

    def take(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, P [rows, columns]) of each tile; it is given back as soon as the next one is asked for."""
        self._tiles.reverse()
        while self._tiles:
            columns, tile = self._tiles.pop()
            if self._chosen is not None:
                tile = tile.index_select(0, self._chosen)
            yield columns, tile[:, : columns.stop - columns.start]
            del tile

    def row_factor(self, grad_logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """c [rows] for g [rows], the gradient of logprob divided by the temperature."""
        return (self.base - lse).exp_().mul_(grad_logits).neg_()

    def label_entries(self, logprobs: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """P_label [rows] such that c P_label is the label's gradient."""
        return (lse - self.base).exp_().mul_(logprobs.expm1())

    def release(self) -> None:
        """Give all tiles back: nobody will take them."""
        self._groups = {}
        self._tiles.clear()


def put_labels_(values: torch.Tensor, labels: torch.Tensor, first_column: int, entries: torch.Tensor) -> None:
    """Write entries [rows] where the labels [rows] (global) are in this tile [rows, columns], in place."""
    label, owned = local_labels(labels, first_column, values.shape[1])
    entry = entries.to(values.dtype).unsqueeze(1)
    values.scatter_(1, label, torch.where(owned.unsqueeze(1), entry, values.gather(1, label)))

"""Forward and backward of `linear_logprob`: products with their waves, memory-bound kernels, gaps between launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernel_model.devices import LAUNCH, TARGET_SHAPE, TARGETS, Device, Shape
from megatron_laser.logprob_memory import KEPT_TILE_BYTES, MIB, TILE_BYTES
from megatron_laser.ops.slices import EXPOSED, group_slices, row_blocks, slice_widths, waste

GB = 1e9
# Elementwise kernels that read or write whole tensors reach this share of the rate of a copy.
ELEMENTWISE = 0.90
# What float32 results add to a half-precision product of depth 5120: its end writes twice the bytes.
EPILOGUE = 0.02
# Merging the statistics of all slices into log-probs: 13 torch kernels over [rows].
FINISH = 13 * 2e-6
# Seconds of a group's collectives at tp 8: two of [rows]; dX's reduction, most of it behind the last product.
FORWARD_COLLECTIVES, BACKWARD_COLLECTIVES = 0.08e-3, 0.3e-3
# Of the blocks of rows in which a loss inside works: probabilities of all columns.
BLOCK_BYTES = 1.25 * GB


@dataclass(frozen=True)
class Prediction:
    """Seconds of each term; extra_bytes: at the peak, on top of inputs and gradients."""

    device: str
    shape: Shape
    variant: str
    three_products: float
    forward: dict[str, float]
    backward: dict[str, float]
    extra_bytes: float

    @property
    def sum(self) -> float:
        """Seconds of forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def ratio(self) -> float:
        """The sum over three products at the rate of one large product: the least that any implementation needs."""
        return self.sum / self.three_products

    @property
    def target(self) -> str:
        """Whether the target is met, where there is one."""
        if self.shape != TARGET_SHAPE:
            return ""
        limit = TARGETS[self.device]
        return f"met (<= {limit})" if self.ratio <= limit else f"missed (<= {limit})"

    def row(self) -> dict[str, Any]:
        """What --json writes: milliseconds, ratios, GB."""
        one = self.three_products / 3
        forward, backward = sum(self.forward.values()), sum(self.backward.values())
        return {
            "device": self.device,
            "shape": str(self.shape),
            "tp": self.shape.shards,
            "variant": self.variant,
            "forward_ms": round(forward * 1e3, 3),
            "forward_over_product": round(forward / one, 3),
            "backward_ms": round(backward * 1e3, 3),
            "sum_ms": round(self.sum * 1e3, 3),
            "sum_over_3_products": round(self.ratio, 3),
            "extra_gb": round(self.extra_bytes / GB, 2),
            "target": self.target,
            "forward_terms_ms": {name: round(value * 1e3, 3) for name, value in self.forward.items()},
            "backward_terms_ms": {name: round(value * 1e3, 3) for name, value in self.backward.items()},
        }


class Model:
    """The terms of one shape on one device."""

    def __init__(self, device: Device, shape: Shape, tile_bytes: int = TILE_BYTES) -> None:
        self.device, self.shape = device, shape
        self.product = 2 * shape.rows * shape.hidden * shape.columns / device.flops
        self.widths = self.slices(shape.rows, tile_bytes)

    def slices(self, rows: int, tile_bytes: int = TILE_BYTES) -> list[int]:
        """Widths of the slices of a tile of `rows` rows of float32 logits."""
        return slice_widths(
            rows,
            self.shape.hidden,
            self.shape.columns,
            widest=tile_bytes // 4 // rows,
            multiprocessors=self.device.multiprocessors,
        )

    def kept_tiles(self) -> list[int]:
        """Columns of the tensors in which probabilities are kept."""
        groups = group_slices(self.widths, KEPT_TILE_BYTES // 2 // self.shape.rows)
        return [sum(self.widths[group]) for group in groups]

    def waste(self, rows: int, widths: list[int]) -> tuple[float, float, float]:
        """Of z, dX and dW, see `ops/slices.py`."""
        return waste(rows, self.shape.hidden, widths, self.device.multiprocessors)

    def pass_over(self, nbytes: float) -> float:
        """Seconds of memory-bound kernels that move so many bytes."""
        return nbytes / self.device.bytes / ELEMENTWISE

    def read_and_write(self, elements: float) -> float:
        """Seconds that a product's accumulation into float32 `elements` adds to it."""
        return EXPOSED * 8 * elements / self.device.bytes

    def logits(self, rows: int, widths: list[int]) -> float:
        """All logits, in float32, in tiles of `rows` rows."""
        return self.product * self.waste(rows, widths)[0] * (1 + EPILOGUE * 5120 / self.shape.hidden)

    def collectives(self, seconds: float) -> float:
        """`seconds` in a group of ranks."""
        return seconds if self.shape.shards > 1 else 0.0

    def forward(self, kept: float = 0.0) -> dict[str, float]:
        """Products and one read of the logits; of a share `kept` probabilities are written in bf16."""
        rows, _, columns, _ = self.shape
        terms = {
            "z": self.logits(rows, self.widths),
            "statistics": self.pass_over(4 * rows * columns),
            "launches": 2 * len(self.widths) * LAUNCH + FINISH,
            "collectives": self.collectives(FORWARD_COLLECTIVES),
        }
        if kept:
            terms["kept probabilities"] = self.pass_over(2 * rows * columns * kept)
            # The base is the maximum of the first slice, which is therefore read once more.
            terms["base"] = self.pass_over(4 * rows * self.widths[0])
        return terms

    def recompute(self, main_grad: bool = False, share: float = 1.0) -> dict[str, float]:
        """The backward of a `share` of the slices whose logits are made again: three products, a dz of each slice."""
        rows, hidden, columns, _ = self.shape
        z_waste = self.logits(rows, self.widths)
        _, dx, dw = self.waste(rows, self.widths)
        return {
            "z again": share * z_waste,
            "dz": share * self.pass_over(6 * rows * columns),
            "dX": share * (self.product * dx + len(self.widths) * self.read_and_write(rows * hidden)),
            "dW": share * self.product * dw,
            "main_grad": share * self.read_and_write(columns * hidden) if main_grad else 0.0,
            "launches": share * 4 * len(self.widths) * LAUNCH,
        }

    def around(self) -> dict[str, float]:
        """What every backward does once: dX from float32 to bf16, its reduction."""
        rows, hidden, _, _ = self.shape
        return {
            "dX in bf16": self.pass_over(6 * rows * hidden),
            "collectives": self.collectives(BACKWARD_COLLECTIVES),
        }

    def from_kept(
        self, main_grad: bool = False, share: float = 1.0, skipped: float = 0.0
    ) -> dict[str, float]:
        """The backward of a `share` of the columns whose probabilities were kept: two products for each tile of them.

        skipped: share of the rows that have no gradient: the others' probabilities are copied out of each tile.
        """
        rows, hidden, columns, _ = self.shape
        left = round(rows * (1 - skipped))
        tiles = self.kept_tiles()
        _, dx, dw = self.waste(left, tiles)
        product = share * self.product * left / rows
        copied = 4 * left * columns if skipped else 0
        return {
            # The row scale is part of dX's conversion to bf16.
            "dX": product * dx + share * len(tiles) * self.read_and_write(left * hidden),
            "dW": product * dw,
            "c X": self.pass_over(4 * left * hidden),
            "main_grad": share * self.read_and_write(columns * hidden) if main_grad else 0.0,
            "rows copied": share * self.pass_over(copied),
            # Two products, the label's entries fixed, and the tile's release.
            "launches": share * 4 * len(tiles) * LAUNCH,
        }

    def blocks(self) -> list[int]:
        """Rows of the blocks in which a loss inside works."""
        most = int(BLOCK_BYTES) // 2 // self.shape.columns
        _, hidden, columns, _ = self.shape
        units = self.device.multiprocessors
        return row_blocks(self.shape.rows, hidden, columns, most=most, multiprocessors=units)

    def in_blocks(self, main_grad: bool = False) -> dict[str, float]:
        """Forward and backward with the loss inside, block of rows by block of rows.

        Every block's dW is added to the others' in float32: to main_grad, or to a buffer that becomes bf16 at last.
        """
        rows, hidden, columns, _ = self.shape
        blocks = self.blocks()
        terms: dict[str, float] = {}
        for block in blocks:
            widths, share = self.slices(block), block / rows
            _, dx, _ = self.waste(block, widths)
            dw = self.waste(block, [columns])[2]
            one = {
                "z": share * self.logits(block, widths),
                "statistics, kept": self.pass_over(6 * block * columns),
                "base": self.pass_over(4 * block * widths[0]),
                "dX": share * self.product * dx,
                "dW": share * self.product * dw,
                "c X": self.pass_over(4 * block * hidden),
                "launches": (2 * len(widths) + 4) * LAUNCH + FINISH,
                "collectives": self.collectives(FORWARD_COLLECTIVES),
            }
            terms = _added(terms, one)
        terms["dW"] += (len(blocks) - 1 + main_grad) * self.read_and_write(columns * hidden)
        # One block without main_grad writes dW in bf16 at once.
        terms["dW in bf16"] = 0.0 if main_grad or len(blocks) == 1 else self.pass_over(6 * columns * hidden)
        return terms


def even_widths(columns: int, widest: int) -> list[int]:
    """As few slices as possible, of about equal size, multiples of 128: what was done before waves were counted."""
    even = -(-columns // -(-columns // widest))
    width = min(-(-even // 128) * 128, widest)
    return [min(width, columns - start) for start in range(0, columns, width)]


def predictions(device: Device, shape: Shape) -> Iterator[Prediction]:
    """All variants of one shape on one device."""
    rows, hidden, columns, _ = shape
    model, before = Model(device, shape), Model(device, shape)
    before.widths = even_widths(columns, 512 * MIB // 4 // rows)

    def made(
        name: str, forward: dict[str, float], backward: dict[str, float], extra: float, of: Model = model
    ) -> Prediction:
        return Prediction(device.name, shape, name, 3 * of.product, forward, backward, extra)

    tile, dx = 4 * rows * max(model.widths), 4 * rows * hidden
    recomputed, all_kept = 1.5 * tile + dx, 2 * rows * columns
    for main_grad, suffix in ((False, ""), (True, ", main_grad")):
        yield made(
            f"recomputed, 512 MiB, even slices{suffix}",
            before.forward(),
            before.recompute(main_grad) | before.around(),
            1.5 * 4 * rows * max(before.widths) + dx,
        )
        yield made(
            f"recomputed{suffix}", model.forward(), model.recompute(main_grad) | model.around(), recomputed
        )
        yield made(
            f"kept{suffix}",
            model.forward(kept=1.0),
            model.from_kept(main_grad) | model.around(),
            all_kept + max(tile, 1.5 * dx),
        )
        blocks = model.blocks()
        yield made(
            f"loss inside, {_counted(blocks, 'block')} of rows{suffix}",
            model.in_blocks(main_grad),
            model.around(),
            max(2 * block * columns + 4 * block * max(model.slices(block)) for block in blocks)
            + (0 if main_grad or len(blocks) == 1 else 4 * columns * hidden),
        )
    half = _added(model.from_kept(share=0.5), model.recompute(share=0.5))
    yield made(
        "kept, half of the columns", model.forward(0.5), half | model.around(), all_kept / 2 + recomputed
    )
    yield made(
        "kept, half of the rows without gradient",
        model.forward(1.0),
        model.from_kept(skipped=0.5) | model.around(),
        all_kept + max(tile, 1.5 * dx),
    )


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}" + "s" * (len(things) > 1)


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}

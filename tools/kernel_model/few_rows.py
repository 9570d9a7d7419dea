"""A call of `few_row_logprob`: one read of the weight, what follows it, and the host."""

from __future__ import annotations

from typing import Any, NamedTuple

from kernel_model.devices import LAUNCH, Device, Shape

# Columns that give each of 132 multiprocessors one tile of a shard of 152064 / 8.
NARROW_TILE = 144
# Bytes per second that one multiprocessor reads at most.
ONE_UNIT_BYTES = 65e9


class FewRows(NamedTuple):
    """A call of `few_row_logprob`: seconds of its parts, and of one read of the weight."""

    device: str
    shape: Shape
    variant: str
    read: float
    kernel: float
    finish: float
    collectives: float
    host: float

    @property
    def call(self) -> float:
        """From call to result, where calls follow each other: the device or the host, whichever takes longer."""
        return max(self.kernel + self.finish + self.collectives, self.host)

    def row(self) -> dict[str, Any]:
        """What --json writes."""
        parts = {
            f"{name}_ms": round(getattr(self, name) * 1e3, 4)
            for name in ("read", "kernel", "finish", "collectives", "host", "call")
        }
        known = {
            "device": self.device,
            "shape": str(self.shape),
            "tp": self.shape.shards,
            "variant": self.variant,
        }
        return known | parts | {"call_over_read": round(self.call / self.read, 2)}


def few_rows(device: Device, shape: Shape) -> list[FewRows]:
    """The CUDA kernel with tiles of 256 columns and many small kernels after it, and as it is planned: one kernel
    after it, one all-gather, and at tp 8 the narrower tile that gives every multiprocessor one."""
    group = shape.shards > 1
    before = _few_row_kernel(device, shape, 256)
    now = min(before, _few_row_kernel(device, shape, NARROW_TILE))
    read = 2 * shape.columns * shape.hidden / device.bytes
    return [
        FewRows(
            device.name, shape, "14 small kernels after it", read, before, 15 * 2e-6, 45e-6 * group, 140e-6
        ),
        FewRows(device.name, shape, "one kernel after it", read, now, 2e-6 + LAUNCH, 25e-6 * group, 60e-6),
    ]


def _few_row_kernel(device: Device, shape: Shape, tile: int) -> float:
    """Waves of tiles of `tile` columns, each bound by memory or by its products, and 6 us to start and to end."""
    tile_bytes, units = 2 * tile * shape.hidden, device.multiprocessors
    rows = shape.rows if tile % 128 == 0 else -(-shape.rows // 64) * 64  # which of the two are wgmma's M
    products = 2 * tile * rows * shape.hidden / (device.flops / units)
    full, rest = divmod(-(-shape.columns // tile), units)
    last = max(rest * tile_bytes / device.bytes, tile_bytes / ONE_UNIT_BYTES, products) if rest else 0.0
    return full * max(units * tile_bytes / device.bytes, products) + last + 6e-6

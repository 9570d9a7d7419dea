"""A call of `few_row_logprob`: one read of the weight, what follows it, and the host."""

from __future__ import annotations

from typing import Any, NamedTuple

from kernel_model.devices import LAUNCH, Device, Shape
from megatron_laser.ops.cuda.plan import Plan, Rates, choose, plans

# Seconds of a kernel before its first copy arrives and after its last product.
START_AND_END = 6e-6


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
    after it, one all-gather, and the form and width of tiles that `ops/cuda/plan.py` chooses."""
    units = device.multiprocessors
    rates, group = Rates(device.bytes, device.flops / units), shape.shards > 1

    def kernel(plan: Plan) -> float:
        return plan.reading(shape.columns, units, shape.hidden, rates) + START_AND_END

    before = kernel(plans(shape.rows)[0])
    now = kernel(choose(shape.rows, shape.columns, units, shape.hidden))
    read = 2 * shape.columns * shape.hidden / device.bytes
    return [
        FewRows(
            device.name, shape, "14 small kernels after it", read, before, 15 * 2e-6, 45e-6 * group, 140e-6
        ),
        FewRows(device.name, shape, "one kernel after it", read, now, 2e-6 + LAUNCH, 25e-6 * group, 60e-6),
    ]

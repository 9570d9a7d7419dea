"""Optimizer state per model parameter, the same for every Megatron optimizer and every layout.

Megatron's own formats differ between the plain and the distributed optimizer, and loading torch's AdamW through
the distributed one hands the *same* `step` tensor to every parameter (megatron-core 0.19.2
distrib_optimizer.py:1032), so that one update advances it once per parameter. Here the state is three fp32
tensors in the shape of the model parameter (main weight, exp_avg, exp_avg_sq) and one step count. The
distributed optimizer's slices are put together over the data-parallel group when saving
(`checkpoint/sharded_state.py`) and cut again when loading: a run may change its layout, and turn the distributed
optimizer on or off, between the two.

Only this module names the insides of Megatron's optimizers, as read in Megatron-Core 0.16.1 and 0.19.2:
`chained_optimizers`, `is_stub_optimizer`, the groups of `Float16OptimizerWithFloat16Params`, and
`model_param_group_index_map`, `_get_model_param_range_map` and `buffers` of `DistributedOptimizer`; and of Transformer
Engine's FusedAdam `initialize_state`, with which it keeps moments in bfloat16 and then, beside them and under the bf16
slices of the model's parameters, the fp32 main weights too (read in 2.20.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params

MAIN, EXP_AVG, EXP_AVG_SQ = "main_param", "exp_avg", "exp_avg_sq"
KINDS = (MAIN, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class _Slot:
    """Where one model parameter's state lives in the torch optimizer.

    main: the tensor that the torch optimizer updates, a flat slice of the parameter under the distributed
    optimizer; [start, stop) is that slice in the flattened parameter. Where the optimizer keeps the main weights itself
    it is the slice of the model's own parameter.
    """

    main: torch.Tensor
    optimizer: torch.optim.Optimizer
    start: int
    stop: int

    def tensor(self, kind: str) -> torch.Tensor:
        """The live tensor of `kind`; Adam's moments are created (as zeros) where there are none yet."""
        if _keeps_main_weights(self.optimizer):
            if not self.optimizer.state[self.main]:
                self.optimizer.initialize_state(self.main, False)  # type: ignore[attr-defined]
            return self.optimizer.state[self.main]["master_param" if kind == MAIN else kind]
        if kind == MAIN:
            return self.main
        state = self.optimizer.state[self.main]
        if type(self.optimizer).__module__.startswith("torch."):
            # A save before the first update must not leave a state that looks initialised but counts nothing.
            state.setdefault("step", torch.tensor(0.0))
        if kind not in state:
            state[kind] = torch.zeros_like(self.main, dtype=torch.float32)
        return state[kind]


@dataclass(frozen=True)
class Place:
    """Where one parameter's state is: this rank's `slot` (None: it has no slice of it), and the group whose ranks
    together hold the parameter (None: this rank holds all of it)."""

    slot: _Slot | None
    group: dist.ProcessGroup | None

    def whole(self, kind: str) -> torch.Tensor:
        """The live tensor of `kind`, flat; only where `group` is None."""
        assert self.slot is not None and self.group is None
        return self.slot.tensor(kind).detach().flatten()

    def part(self, kind: str, start: int, stop: int) -> tuple[int, torch.Tensor] | None:
        """What this rank holds of elements [start, stop) of the flat parameter: (first element, live tensor)."""
        slot = self.slot
        if slot is None or slot.start >= stop or slot.stop <= start:
            return None
        first, last = max(start, slot.start), min(stop, slot.stop)
        return first, slot.tensor(kind).detach().flatten()[first - slot.start : last - slot.start]

    @torch.no_grad()
    def restore(self, kind: str, whole: torch.Tensor) -> None:
        """Take this rank's slice of `whole`, which has the parameter's local shape."""
        if self.slot is not None:
            own = whole.flatten()[self.slot.start : self.slot.stop]
            self.slot.tensor(kind).copy_(own.view_as(self.slot.main))


def _keeps_main_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is Transformer Engine's FusedAdam with main weights of its own."""
    return bool(getattr(optimizer, "master_weights", False))


def places(optimizer: MegatronOptimizer) -> dict[int, Place]:
    """id(model parameter) -> where its state is. Creates moments (zeros) that the first update would create."""
    found = {}
    for parameter, slot, group in _parameters(optimizer):
        if slot is not None:
            for kind in KINDS:
                slot.tensor(kind)
        shared = group is not None and dist.get_world_size(group) > 1
        found[id(parameter)] = Place(slot, group if shared else None)
    return found


def missing_moment_bytes(optimizer: MegatronOptimizer) -> int:
    """What the state that does not exist yet will take on the device; the first update makes it."""
    total = 0
    for inner in torch_optimizers(optimizer):
        sizes = {EXP_AVG: 4, EXP_AVG_SQ: 4}
        if _keeps_main_weights(inner):
            sizes = {name: dtype.itemsize for name, dtype in inner.name_to_dtype_map.items()}  # type: ignore[attr-defined]
        for group in inner.param_groups:
            for main in group["params"]:
                there = inner.state.get(main, {})
                total += main.numel() * sum(size for name, size in sizes.items() if name not in there)
    return total


def get_step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far; Adam's bias correction depends on it."""
    for inner in _chained(optimizer):
        for group in inner.optimizer.param_groups:
            if "step" in group:  # Apex and Transformer Engine keep one count for each group
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in inner.optimizer.state.get(parameter, {}):
                    return int(inner.optimizer.state[parameter]["step"])
    return 0


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the update count; torch's AdamW gets a tensor of its own for every parameter."""
    for inner in _chained(optimizer):
        per_parameter = type(inner.optimizer).__module__.startswith("torch.")
        for group in inner.optimizer.param_groups:
            if not per_parameter:
                group["step"] = step
                continue
            for parameter in group["params"]:
                inner.optimizer.state[parameter]["step"] = torch.tensor(float(step))


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that hold this rank's state and update its main weights."""
    return [inner.optimizer for inner in _chained(optimizer)]


def _chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    inner = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [one for one in inner if not getattr(one, "is_stub_optimizer", False)]


def _parameters(
    optimizer: MegatronOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, _Slot | None, dist.ProcessGroup | None]]:
    """(model parameter, this rank's slot or None, group to sum slices over or None), in one order everywhere."""
    for inner in _chained(optimizer):
        if isinstance(inner, DistributedOptimizer):
            yield from _distributed(inner)
        elif isinstance(inner, Float16OptimizerWithFloat16Params):
            pairs = [
                *zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True),
                *zip(inner.fp32_from_fp32_groups, inner.fp32_from_fp32_groups, strict=True),
            ]
            for models, mains in pairs:
                for parameter, main in zip(models, mains, strict=True):
                    yield parameter, _Slot(main, inner.optimizer, 0, main.numel()), None
        else:
            for group in inner.optimizer.param_groups:
                for parameter in group["params"]:
                    slot = _Slot(parameter, inner.optimizer, 0, parameter.numel())
                    yield parameter, slot, None


def _distributed(
    inner: DistributedOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, _Slot | None, dist.ProcessGroup]]:
    group = inner.data_parallel_group
    owned = inner.model_param_group_index_map
    for buffer in inner.buffers:
        for parameter in buffer.params:
            slot = None
            if parameter in owned:
                group_index, order = owned[parameter]
                main = inner.optimizer.param_groups[group_index]["params"][order]
                part = inner._get_model_param_range_map(parameter)["param"]
                slot = _Slot(main, inner.optimizer, part.start, part.end)
            yield parameter, slot, group

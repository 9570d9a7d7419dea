"""Sums and maxima over micro-batches, optimizer steps and ranks, in one pair of collectives per step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

# Reported as their mean over the optimizer steps of a rollout batch; the other sums are counts and numerators.
MEAN_KEYS = (
    "policy_loss",
    "self_reward_loss",
    "kl_loss",
    "entropy",
    "total_loss",
    "clip_fraction",
    "approx_kl",
)
SUM_KEYS = (
    *MEAN_KEYS,
    "mismatch_count",
    "mismatch_sum",
    "mismatch_k3",
    "importance_masked",
    "importance_rows",
)
MAX_KEYS = ("max_mismatch",)


def reduce_sums(
    entries: Iterable[Mapping[str, torch.Tensor]], *, contributes: bool, group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Add up (or take the maximum of) the named scalars of all micro-batches and ranks.

    Keys outside SUM_KEYS and MAX_KEYS are an error: every rank must send the same vector. Ranks that do not
    contribute (they hold a copy of another rank's rows, or none) take part with zeros.
    """
    sums = dict.fromkeys(SUM_KEYS, 0.0)
    maxima = dict.fromkeys(MAX_KEYS, 0.0)
    if contributes:
        columns: dict[str, list[torch.Tensor]] = {}
        for entry in entries:
            for name, value in entry.items():
                columns.setdefault(name, []).append(value)
        for name, values in columns.items():
            stacked = torch.stack(values)
            if name in maxima:
                maxima[name] = float(stacked.max())
            elif name in sums:
                sums[name] = float(stacked.sum())
            else:
                raise KeyError(f"metric {name!r} is in neither SUM_KEYS nor MAX_KEYS")
    if group is None:
        return sums | maxima
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    largest = torch.tensor(list(maxima.values()), dtype=torch.float64)
    dist.all_reduce(total, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(sums, total.tolist())) | dict(zip(maxima, largest.tolist()))

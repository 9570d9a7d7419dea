"""Sums and maxima over micro-batches, optimizer steps and ranks, in one pair of collectives per step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

# Terms of the loss, weighted as the loss weights them: reported as means over the optimizer steps of a rollout batch.
MEAN_KEYS = ("policy_loss", "self_reward_loss", "self_reward_error", "kl_loss", "total_loss")
# Diagnostics, as plain sums over policy rows: reported as means over the response tokens of all optimizer steps, so
# that they say the same under every `policy.loss_aggregation` and however the batch is cut.
TOKEN_MEAN_KEYS = ("entropy", "clip_fraction", "approx_kl", "reference_kl", "importance_masked_fraction")
ROWS_KEY = "policy_rows"
_MISMATCH_KEYS = ("mismatch_count", "mismatch_sum", "mismatch_k3", "zc_mismatch_count", "zc_mismatch_sum")
SUM_KEYS = (*MEAN_KEYS, *TOKEN_MEAN_KEYS, ROWS_KEY, *_MISMATCH_KEYS)
MAX_KEYS = ("max_mismatch", "max_zc_mismatch")


def readout_key(index: int, name: str, *, trained: bool) -> str:
    """What a readout's loss is called: the first one has names of its own."""
    if index == 0:
        return "self_reward_loss" if trained else "self_reward_error"
    return f"readout/{name}/loss"


def score_key(index: int, name: str) -> str:
    """What a bad step calls a readout's scores that are not finite."""
    return "zc_logprob" if index == 0 else f"readout/{name}/score"


def means(totals: Mapping[str, float], *, updates: int) -> dict[str, float]:
    """What is reported of `reduce_sums`: MEAN_KEYS over the optimizer steps, TOKEN_MEAN_KEYS over their tokens.

    Args:
        totals: of all ranks, over `updates` optimizer steps. NaN where there was none, or no token.
    """
    return {name: ratio(totals[name], updates) for name in MEAN_KEYS} | {
        name: ratio(totals[name], totals[ROWS_KEY]) for name in TOKEN_MEAN_KEYS
    }


def ratio(total: float, count: float) -> float:
    """total / count, NaN for a count of 0."""
    return total / count if count else math.nan


def reduce_sums(
    entries: Iterable[Mapping[str, torch.Tensor]],
    *,
    contributes: bool,
    group: dist.ProcessGroup | None,
    more: Sequence[str] = (),
) -> dict[str, float]:
    """Add up (or take the maximum of) the named scalars of all micro-batches and ranks.

    Keys outside SUM_KEYS, MAX_KEYS and `more` (sums) are an error: every rank must send the same vector. Ranks that do
    not contribute (they hold a copy of another rank's rows, or none) take part with zeros.
    """
    sums = dict.fromkeys((*SUM_KEYS, *more), 0.0)
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
                raise KeyError(
                    f"metric {name!r} is in none of MEAN_KEYS (weighted as the loss), TOKEN_MEAN_KEYS (a sum over "
                    "rows) and MAX_KEYS of trainer/step_metrics.py"
                )
    if group is None:
        return sums | maxima
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    largest = torch.tensor(list(maxima.values()), dtype=torch.float64)
    dist.all_reduce(total, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(sums, total.tolist())) | dict(zip(maxima, largest.tolist()))

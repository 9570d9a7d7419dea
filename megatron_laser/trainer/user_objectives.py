"""The user's own objectives: what a function returned is looked at before anything is made of it.

Numbers that are not finite are another matter: a loss of them is a bad step, which is skipped on all ranks
(`trainer.forward_backward`), since a function gives them where the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_laser.algorithms.objectives import PolicyRows, RowLosses
from megatron_laser.user_functions import UserFunctionError


def checked_policy_loss(
    spec: str, function: Callable[[PolicyRows], RowLosses | Tensor]
) -> Callable[[PolicyRows], RowLosses | Tensor]:
    """`function`, which `policy.loss` names as `spec`, and a look at what it returns.

    The result raises UserFunctionError, before any backward, for what is not one loss for each row with a gradient.
    """

    def loss(rows: PolicyRows) -> RowLosses | Tensor:
        found = function(rows)
        if problem := _loss_problem(found, rows.logprobs):
            raise UserFunctionError(f"policy.loss: {spec} returned {problem}")
        return found

    return loss


def checked_advantages(setting: str, spec: str, found: Any, like: Tensor) -> Tensor:
    """What the function `spec`, which `setting` names, returned, as float32 on the CPU; `like`: [samples].

    Raises UserFunctionError for anything but one finite number for each sample.
    """
    expected = f"expected {len(like)} finite advantages, one for each sample"
    if not isinstance(found, Tensor):
        raise UserFunctionError(f"{setting}: {spec} returned {_type(found)}; {expected}")
    if found.shape != like.shape:
        raise UserFunctionError(
            f"{setting}: {spec} returned a tensor of shape {tuple(found.shape)}; {expected}"
        )
    wrong = (~torch.isfinite(found)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise UserFunctionError(
            f"{setting}: {spec} returned {float(found[first])} for sample {first}, and {len(wrong)} of {len(found)} "
            f"that are not finite, of finite rewards and scores; {expected}"
        )
    return found.detach().cpu().float()


def _loss_problem(found: Any, logprobs: Tensor) -> str:
    """What is wrong with a policy loss of rows with these log-probs [rows], in words; "" where nothing is."""
    rows = len(logprobs)
    expected = f"expected a tensor with one loss for each of {rows} rows, or RowLosses(loss, clipped)"
    if isinstance(found, tuple) and len(found) != 2:
        return f"a tuple of {len(found)}; {expected}"
    loss, clipped = found if isinstance(found, tuple) else (found, None)
    for name, values in (("", loss), ("clipped: ", clipped)):
        if values is None and name:
            continue
        if not isinstance(values, Tensor):
            return f"{name}{_type(values)}; {expected}"
        if values.shape != logprobs.shape:
            return f"{name}a tensor of shape {tuple(values.shape)}; {expected}"
        if values.device != logprobs.device:
            return f"{name}a tensor on {values.device}; the rows are on {logprobs.device}"
    if not loss.is_floating_point():
        return f"a loss of {loss.dtype}; expected floating-point numbers"
    # Without rows there is nothing that a gradient could come from.
    if rows and logprobs.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        return (
            "a loss without a gradient, of which nothing would be learned; make it of rows.logprobs with torch's own "
            "operations, without detach(), torch.no_grad() or NumPy"
        )
    return ""


def _type(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"

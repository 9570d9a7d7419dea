"""The public calls of the log-prob op: argument checks, then the backend that each gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_laser.ops import sets as over_sets
from megatron_laser.ops import torch_backend
from megatron_laser.ops.collectives import group_size
from megatron_laser.ops.device import kernels_refuse
from megatron_laser.ops.few_rows import check_rows
from megatron_laser.ops.passes import RowLoss
from megatron_laser.ops.types import LogProbs


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    own_rows: tuple[int, int] | None = None,
    distinct_rows: bool = False,
    inv_temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    loss: RowLoss | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-prob of one label per row under softmax(hidden @ weight.T * inv_temperature), with gradients.

    Differentiable in `hidden` and `weight`. No [rows, vocabulary] tensor of logits exists at any time; logits and sums
    are float32 whatever the dtype of the inputs (float64 for float64 inputs). For the backward as many probabilities
    are kept, in the inputs' dtype, as `ops.settings` allows.

    Args:
        hidden: [T, H]. Replicated over `tp_group` (its gradient is then all-reduced), or, with `sequence_parallel`,
            this rank's equal-length shard of all tokens.
        weight: [V_shard, H], rows [rank * V_shard, (rank + 1) * V_shard) of the (padded) vocabulary.
        labels: [n] int64 global vocabulary ids; -100 is no label and gives 0 and no gradient. A label
            outside the vocabulary gives NaN (`check_labels` names it).
        rows: [n] int64 positions in `hidden` (with `sequence_parallel`: in that of all ranks, in rank order) that the
            labels belong to, in any order; one that has several labels is there several times, and multiplied as
            often. None: every row once.
        own_rows: (first, last) if rows[first:last], and only these, are in this rank's shard: the first product then
            runs while the others are gathered. None: unknown, or no `sequence_parallel`.
        distinct_rows: no position is in `rows` twice: then dX is copied to the tokens, else it is sorted and added up.
            Not checked on a CUDA device, where a position that is there twice would lose a part.
        inv_temperature: 1 / temperature, one for all rows or [n]. Not differentiable.
        vocab_size: the real vocabulary; columns from here on are padding and have probability 0.
            None: all columns are real.
        tp_group: the ranks that share the vocabulary. All of them call together and get the same results.
        sequence_parallel: `hidden` is gathered along dim 0 and its gradient reduce-scattered; `labels`,
            `inv_temperature` and the results cover the rows of all ranks.
        with_entropy: also return the entropy in nats of each labelled row's (scaled) distribution.
        entropy_gradient: whether the entropy is differentiable.
        loss: (logprobs [m], entropy [m] or None, slice) -> the scalar loss of rows `slice` of the n, which must be a
            sum over rows. With it the op may work through blocks of rows where the probabilities of all of them do not
            fit: it then makes the gradients in the forward, and the loss that the caller takes the backward of has to
            be the sum of these, with the factor 1; the same on all ranks of `tp_group`.
        backend: "auto" or a name from `available_backends`.

    Raises:
        ValueError: shapes, dtypes, devices or `vocab_size` that do not fit together; an unknown backend.
        RuntimeError: a backend that cannot run here; in the backward, a gradient that is not that of `loss`.
    """
    count = check_rows(hidden, rows, tp_group, sequence_parallel)
    _check(hidden, weight, labels, count, vocab_size, tp_group)
    _check_rows_of(hidden, rows, count, own_rows, distinct_rows, sequence_parallel, inv_temperature)
    return resolve_backend(backend, hidden.device).linear_logprob(
        hidden,
        weight,
        labels,
        rows=rows,
        own_rows=own_rows,
        distinct_rows=distinct_rows,
        inv_temperature=inv_temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        with_entropy=with_entropy,
        entropy_gradient=entropy_gradient,
        loss=loss,
    )


def set_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    sets: over_sets.Sets,
    *,
    rows: torch.Tensor | None = None,
    own_rows: tuple[int, int] | None = None,
    distinct_rows: bool = False,
    inv_temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """Log-prob of one label per row under the softmax over a set of columns of that row, with gradients.

    z_label - logsumexp of z over the set, z = hidden @ weight.T * inv_temperature: the other columns have probability
    0, and only members of sets are multiplied. Differentiable in `hidden` and `weight`; the work and the memory are
    those of chunks of rows, in tiles of `ops.settings`. Plain torch on every device; bitwise repeatable.

    Args:
        sets: of each of the n rows, with its label among them. A label that is not (looked at on a CPU only) gives
            a number without meaning.

    Other arguments, dtypes, and errors as in `linear_logprob`. Returns [n].
    """
    count = check_rows(hidden, rows, tp_group, sequence_parallel)
    _check(hidden, weight, labels, count, vocab_size, tp_group)
    _check_rows_of(hidden, rows, count, own_rows, distinct_rows, sequence_parallel, inv_temperature)
    over_sets.check_sets(sets, labels, vocab_size or weight.shape[0] * group_size(tp_group))
    return over_sets.apply(
        hidden,
        weight,
        labels,
        sets,
        rows=rows,
        inv_temperature=inv_temperature,
        vocab_size=vocab_size,
        placement=over_sets.Placement(tp_group, sequence_parallel, own_rows, distinct_rows or rows is None),
    )


@torch.no_grad()
def few_row_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Log-prob of one label per row at temperature 1, without gradient, for few rows (the EOS rows).

    Args:
        rows: [n] int64 positions in `hidden`, with `sequence_parallel` in the rows of all ranks in rank order; the same
            on every rank. None: every row once, then n is their number.
        sequence_parallel: `hidden` is this rank's equal-length shard of the rows. With `rows` the others are not
            gathered: only the n rows travel.

    Other arguments and errors as in `linear_logprob`; labels and result are [n], the result float32 (float64
    for float64 inputs).

    Raises:
        ValueError: also for `rows` of another shape, dtype or device, or on a CPU with positions outside `hidden`; on a
            CUDA device such a position under sequence parallelism gives NaN.
    """
    count = check_rows(hidden, rows, tp_group, sequence_parallel)
    _check(hidden, weight, labels, count, vocab_size, tp_group)
    return resolve_backend(backend, hidden.device).few_row_logprob(
        hidden,
        weight,
        labels,
        rows=rows,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
    )


def _check_rows_of(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    count: int,
    own_rows: tuple[int, int] | None,
    distinct_rows: bool,
    sequence_parallel: bool,
    inv_temperature: float | torch.Tensor,
) -> None:
    if own_rows is not None and not (
        sequence_parallel and rows is not None and 0 <= own_rows[0] <= own_rows[1] <= count
    ):
        raise ValueError(
            f"own_rows={own_rows}: expected 0 <= first <= last <= {count}, with rows and sequence_parallel=True."
        )
    if distinct_rows and rows is not None and rows.device.type == "cpu" and len(rows.unique()) < count:
        raise ValueError(
            f"distinct_rows=True, but {count} rows have {len(rows.unique())} different positions."
        )
    if isinstance(inv_temperature, torch.Tensor) and (
        inv_temperature.shape != (count,)
        or inv_temperature.device != hidden.device
        or inv_temperature.requires_grad
    ):
        raise ValueError(
            f"inv_temperature is {tuple(inv_temperature.shape)} on {inv_temperature.device}, requires_grad="
            f"{inv_temperature.requires_grad}; expected a float or a constant tensor [{count}] on "
            f"{hidden.device}."
        )


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    rows: int,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [rows, H] and "
            "[V_shard, H] with the same H; flatten sequence and batch dimensions first."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype}, weight is {weight.dtype}: expected one floating-point dtype."
        )
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {tuple(labels.shape)} {labels.dtype}: expected [{rows}] torch.int64, one per row "
            "(of all ranks' rows with sequence_parallel=True)."
        )
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden, weight and labels are on {hidden.device}, {weight.device} and {labels.device}: "
            "expected one device."
        )
    columns = weight.shape[0] * group_size(tp_group)
    if columns < 1 or (vocab_size is not None and not 1 <= vocab_size <= columns):
        raise ValueError(
            f"vocab_size={vocab_size}: expected 1 to {columns}, the columns of "
            f"{group_size(tp_group)} shard(s) of {weight.shape[0]}."
        )


@dataclass(frozen=True)
class Backend:
    """One implementation. The two functions take the arguments of the public calls, already checked.

    unavailable: given the device of the inputs, why this backend cannot run there, or None when it can.
    automatic: whether "auto" may take it on that device.
    """

    name: str
    linear_logprob: Callable[..., LogProbs]
    few_row_logprob: Callable[..., torch.Tensor]
    unavailable: Callable[[torch.device], str | None]
    automatic: Callable[[torch.device], bool] = lambda device: True


def _triton_linear_logprob(*args: Any, **kwargs: Any) -> LogProbs:
    # Imported at the first call: the kernels need the package triton, which a CPU installation may lack.
    from megatron_laser.ops import gpu_backend

    return gpu_backend.linear_logprob(*args, **kwargs)


def _triton_few_row_logprob(*args: Any, **kwargs: Any) -> torch.Tensor:
    from megatron_laser.ops import gpu_backend

    return gpu_backend.few_row_logprob(*args, **kwargs)


# Fastest first: "auto" takes the first that is available on the device of the inputs.
_BACKENDS = (
    Backend(
        name="triton",
        linear_logprob=_triton_linear_logprob,
        few_row_logprob=_triton_few_row_logprob,
        unavailable=kernels_refuse,
        automatic=lambda device: device.type == "cuda",
    ),
    Backend(
        name="torch",
        linear_logprob=torch_backend.linear_logprob,
        few_row_logprob=torch_backend.few_row_logprob,
        unavailable=lambda device: None,
    ),
)


def available_backends(device: torch.device) -> list[str]:
    """Names of the backends that run on `device`, fastest first."""
    return [backend.name for backend in _BACKENDS if backend.unavailable(device) is None]


def resolve_backend(name: str, device: torch.device) -> Backend:
    """The backend `name`, or the fastest available one for "auto".

    Raises ValueError for an unknown name and RuntimeError for one that cannot run on `device`: a backend that
    was asked for is never replaced silently.
    """
    if name == "auto":
        return next(
            backend
            for backend in _BACKENDS
            if backend.automatic(device) and backend.unavailable(device) is None
        )
    for backend in _BACKENDS:
        if backend.name == name:
            reason = backend.unavailable(device)
            if reason is None:
                return backend
            raise RuntimeError(
                f"backend={name!r} cannot run on {device}: {reason}. "
                f"Available here: auto, {', '.join(available_backends(device))}."
            )
    raise ValueError(
        f"backend={name!r} is unknown. Available on {device}: auto, {', '.join(available_backends(device))}."
    )

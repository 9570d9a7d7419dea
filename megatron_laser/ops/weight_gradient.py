"""Where dW goes: a gradient for autograd, or straight into Megatron's `main_grad`. One writer for each slice."""

from __future__ import annotations

import torch

from megatron_laser.ops.tiles import accumulation_dtype, add_mm_, mm

_MARK = "linear_logprob_adds_to_main_grad"


def add_weight_gradient_to_main_grad(weight: torch.Tensor) -> None:
    """Let every later `linear_logprob` on this parameter add dW to `weight.main_grad` in its backward.

    That is Megatron's gradient accumulation fusion: dW never exists in the weight's dtype, and with a float32
    `main_grad` it is not rounded. It takes effect while `weight` has `main_grad`, which Megatron's
    DistributedDataParallel sets; the backward then sets `weight.grad_added_to_main_grad` and hands autograd no
    gradient. For the wrapper's hook `weight.grad` is then one zero in the weight's shape, unless something else, like
    a tied embedding, has a gradient.
    """
    setattr(weight, _MARK, True)


def main_grad_of(weight: torch.Tensor) -> torch.Tensor | None:
    """`weight.main_grad` when dW is to be added there, else None."""
    if not getattr(weight, _MARK, False):
        return None
    # The flag belongs to the hook of Megatron's wrapper: without it nobody would look at main_grad.
    return getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None


class WeightGradient:
    """dW [V_shard, H] in the making. `add` once per block of rows, then `close`, slice after slice."""

    def __init__(
        self,
        weight: torch.Tensor,
        main_grad: torch.Tensor | None,
        columns: int,
        *,
        several_passes: bool = False,
    ) -> None:
        """`columns`: the real ones; rows of `weight` behind them are padding and get no gradient.

        several_passes: the vocabulary is gone over more than once; without main_grad that takes a copy of all of dW in
        the accumulation dtype.
        """
        self._main_grad = main_grad
        self._sum: torch.Tensor | None = None
        self._adds = several_passes or main_grad is not None
        if several_passes and main_grad is None:
            self._target = torch.zeros_like(weight, dtype=accumulation_dtype(weight))
        elif main_grad is None:
            self._target = torch.empty_like(weight)
            self._target[columns:].zero_()
        else:
            self._target = main_grad

    def add(self, columns: slice, grad_logits: torch.Tensor, rows: torch.Tensor, *, only: bool) -> None:
        """Add grad_logits [rows, columns] transposed times rows [rows, H]; `only`: no other block follows."""
        target = self._target[columns]
        if self._adds and target.dtype == accumulation_dtype(rows):
            add_mm_(target, grad_logits.t(), rows)
        elif not self._adds and only and target.dtype == rows.dtype:
            torch.mm(grad_logits.t(), rows, out=target)
        elif self._sum is None:
            self._sum = mm(grad_logits.t(), rows)
        else:
            add_mm_(self._sum, grad_logits.t(), rows)

    def add_rows(self, columns: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add gradient [m, H] to the columns [m], of which none is there twice; made with `several_passes`."""
        self._target.index_add_(0, columns, gradient.to(self._target.dtype))

    def close(self, columns: slice) -> None:
        """Write what was summed up in the accumulation dtype, rounded once."""
        if self._sum is not None:
            target = self._target[columns]
            if self._adds:
                target.add_(self._sum)
            else:
                target.copy_(self._sum)
            self._sum = None

    def clear(self) -> None:
        """There are no rows: the gradient is zero."""
        if not self._adds:
            self._target.zero_()

    def for_autograd(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What the backward returns for the parameter `weight`; None where dW is in main_grad."""
        if self._main_grad is None:
            return self._target.to(weight.dtype)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        _leave_a_gradient(weight)
        return None


def _leave_a_gradient(weight: torch.Tensor) -> None:
    """Give `weight.grad` one number, shown in the weight's shape, if this backward pass brings no other gradient.

    Megatron's hook behind AccumulateGrad fires for a parameter without gradient too, but with `overlap_grad_reduce` it
    asserts that there is one (distributed_data_parallel.py, `_make_backward_post_hook`, read in Megatron-Core 0.19.2).
    It reads it only where `zero_out_wgrad`, so that it has to be zero. It is left in front of that hook, when autograd
    has summed up all that comes for this parameter: a tied embedding's gradient is then the only one.
    """
    with torch.enable_grad():
        accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def leave(gradients: tuple[torch.Tensor | None, ...]) -> None:
        handle.remove()  # for this pass; it would keep the parameter alive
        if gradients[0] is None and weight.grad is None:
            weight.grad = weight.new_zeros(()).expand(weight.shape)

    handle = accumulate.register_prehook(leave)

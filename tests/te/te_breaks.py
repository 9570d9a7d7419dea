"""Faults that the comparison has to find; and garbage in what nobody may read."""

import contextlib
from unittest import mock

import torch

NAN = float("nan")


def spoil_unread_gradients():
    """NaN in every gradient that is handed to autograd only because dW is in main_grad already."""
    from transformer_engine.pytorch.module import layernorm_linear, linear

    from megatron_laser.ops.weight_gradient import WeightGradient

    def dummy(shape, dtype, zero=False):
        return torch.full(shape, 0.0 if zero else NAN, dtype=dtype)

    layernorm_linear.get_dummy_wgrad = linear.get_dummy_wgrad = dummy
    original = WeightGradient.for_autograd

    def for_autograd(self, weight):
        gradient = original(self, weight)
        unread = self._main_grad is not None and not getattr(weight, "zero_out_wgrad", False)
        return torch.full_like(weight, NAN) if unread else gradient

    WeightGradient.for_autograd = for_autograd


@contextlib.contextmanager
def broken(name):
    """While a policy is built and trained: see BROKEN_CASES."""
    with _BREAKS[name]():
        yield


def _without_marks(mark):
    from megatron_laser.model.policy_model import PolicyModel

    original = PolicyModel.__init__

    def build(self, *args, **kwargs):
        original(self, *args, **kwargs)
        marked = [p for p in self.parameters() if getattr(p, mark, False)]
        assert marked
        for parameter in marked:
            setattr(parameter, mark, False)

    return mock.patch.object(PolicyModel, "__init__", build)


def _one_writer_of_main_grad():
    from megatron_laser.ops.weight_gradient import WeightGradient

    original = WeightGradient.for_autograd

    def for_autograd(self, weight):
        assert self._main_grad is not None
        original(self, weight)
        weight.grad_added_to_main_grad = False
        return self._main_grad.clone()

    return mock.patch.object(WeightGradient, "for_autograd", for_autograd)


def _accumulation():
    import te_extension

    original = te_extension.generic_gemm

    def overwrite(*args, **kwargs):
        accumulate = 14  # its place among generic_gemm's arguments
        return original(*args[:accumulate], False, *args[accumulate + 1 :], **kwargs)

    return mock.patch.object(te_extension, "generic_gemm", overwrite)


def _context_rank():
    import te_extension

    def of_rank_zero(original):
        return lambda *args: original(*args[:-1], 0)  # the last argument is the place in the context group

    rotations = ("fused_rope_forward", "fused_rope_backward")
    return mock.patch.multiple(te_extension, **{n: of_rank_zero(getattr(te_extension, n)) for n in rotations})


def _note_of_fused_gradients():
    note = property(lambda parameter: False, lambda parameter, value: None)
    return mock.patch.object(torch.nn.Parameter, "grad_added_to_main_grad", note, create=True)


_BREAKS = {
    "shard_marks": lambda: _without_marks("tensor_model_parallel"),
    "sequence_parallel_marks": lambda: _without_marks("sequence_parallel"),
    "accumulation": _accumulation,
    "context_rank": _context_rank,
    "note_of_fused_gradients": _note_of_fused_gradients,
    "one_writer_of_main_grad": _one_writer_of_main_grad,
}

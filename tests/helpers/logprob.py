"""The log-prob op written out in float64, and random problems for it."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laser.ops import IGNORE_LABEL


def reference(hidden, weight, labels, inv_temperature=1.0, vocab_size=None):
    """(logprobs, entropy) in float64 from the full logits."""
    logits = hidden.double() @ weight.double().T
    if isinstance(inv_temperature, torch.Tensor):
        inv_temperature = inv_temperature.double().unsqueeze(1)
    log_p = torch.log_softmax((logits * inv_temperature)[:, :vocab_size], dim=1)
    labelled = labels != IGNORE_LABEL
    logprobs = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return logprobs * labelled, -(log_p.exp() * log_p).sum(1) * labelled


def largest_logit(hidden, weight, inv_temperature=1.0, vocab_size=None):
    """max |z| of the scaled logits, a float."""
    logits = (hidden.double() @ weight.double().T)[:, :vocab_size]
    if isinstance(inv_temperature, torch.Tensor):
        inv_temperature = inv_temperature.double().unsqueeze(1)
    return float((logits * inv_temperature).abs().max())


def tensor_core_tolerance(largest, hidden_size):
    """Absolute tolerance, in nats, of log-probs and entropies whose logits come from Hopper's tensor cores.

    They add 16 products at a time into float32 and cut the sum off instead of rounding it (Fasi et al., PeerJ Comput.
    Sci. 7:e330, for V100 and A100; arXiv 2512.07004 for H100): each of H / 16 additions loses up to one ulp, always
    towards 0. `largest`: max |z|; the second term is for the softmax in float32.
    """
    return largest * hidden_size / 16 * 2**-23 + 2e-5


def inputs(rows=37, hidden_size=16, columns=53, dtype=torch.float32, seed=0, scale=1.0):
    """(hidden, weight, labels) with every fifth row unlabelled, but for a problem of one row, which has a label."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(columns, hidden_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    if rows > 1:
        labels[::5] = IGNORE_LABEL
    return hidden.to(dtype), weight.to(dtype), labels


def gradients(function, hidden, weight, seed=1):
    """(outputs, dX, dW) of a random weighting of both outputs, with dX and dW in the inputs' dtype."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    outputs = [output for output in function(hidden, weight) if output is not None]
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    sum((out * factor.to(out)).sum() for out, factor in zip(outputs, factors)).backward()
    return [out.detach() for out in outputs], hidden.grad, weight.grad


class Products(TorchDispatchMode):
    """Multiplications of the matrix products inside, in those of rows x hidden_size x columns."""

    def __init__(self, rows, hidden_size, columns):
        super().__init__()
        self.whole, self.done = rows * hidden_size * columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[:2] if func._schema.name == "aten::mm" else args[1:3]
            self.done += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return self.done / self.whole

"""`linear_logprob(loss=...)`: blocks of rows with the loss inside equal two passes, and refuse another gradient."""

import dataclasses

import pytest
import torch
from helpers.breadth import combinations
from helpers.logprob import inputs, reference

from megatron_laser.ops import add_weight_gradient_to_main_grad, configure, linear_logprob, torch_backend
from megatron_laser.ops.device import interpreted, kernels_refuse

ROWS, HIDDEN, COLUMNS = 40, 16, 90
OPS = {"torch": torch_backend.linear_logprob}
if kernels_refuse(torch.device("cpu")) is None and interpreted():
    from megatron_laser.ops import gpu_backend
    from megatron_laser.ops.triton.engine import ChunkedEngine

    OPS["triton"] = lambda *inputs, **settings: gpu_backend.linear_logprob(
        *inputs, engine=ChunkedEngine(block=64, min_columns=8), **settings
    )
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(autouse=True)
def settings():
    before = configure(tile_bytes=8 * ROWS * 32, min_block_rows=4)
    yield
    configure(**dataclasses.asdict(before))


class Loss:
    """A clipped ratio against old log-probs, an entropy bonus, and a squared error, as sums over rows."""

    def __init__(self, rows, dtype, entropy=True):
        generator = torch.Generator().manual_seed(3)
        self.advantage = torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)
        self.advantage[::4] = 0.0
        self.old = -4.5 + 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)
        self.entropy, self.calls = entropy, []

    def __call__(self, logprobs, entropy, rows):
        self.calls.append(rows)
        advantage = self.advantage[rows]
        ratio = (logprobs - self.old[rows]).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        loss = loss + 0.1 * ((logprobs + 3) ** 2 * (advantage > 1)).sum()
        return loss - 0.01 * entropy.sum() if self.entropy else loss


def run(op, hidden, weight, labels, loss, keep, main_grad=False, factor=1.0, **settings):
    """(logprobs, entropy, dX, dW) and the blocks that the loss was asked for."""
    configure(keep_logits_bytes=keep)
    loss.calls = []
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if main_grad:
        w.main_grad, w.grad_added_to_main_grad = torch.zeros_like(w), False
        add_weight_gradient_to_main_grad(w)
    found = op(x, w, labels, with_entropy=True, loss=loss, **settings)
    blocks, loss.calls = loss.calls, []
    total = loss(found.logprobs, found.entropy, slice(None)) + 0.0 * found.logprobs.sum()
    (factor * total).backward()
    return (
        found.logprobs.detach(),
        found.entropy.detach(),
        x.grad,
        w.main_grad if main_grad else w.grad,
    ), blocks


def some(dtype, rows=10):
    """Bytes of the probabilities of a few rows."""
    return rows * 96 * dtype.itemsize


@combinations(
    lambda op, main_grad, entropy, dtype: (
        op == "torch" or (main_grad, entropy, dtype) == ("main_grad", "entropy", "float32")
    ),
    op=OPS,
    main_grad={"autograd": False, "main_grad": True},
    entropy={"no entropy": False, "entropy": True},
    dtype={"float32": torch.float32, "float64": torch.float64},
)
def test_blocks_equal_two_passes_and_float64(op, main_grad, entropy, dtype):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS, dtype)
    # A row that is there twice, out of order, and one that is not there at all.
    rows = torch.cat([torch.arange(ROWS - 2), torch.tensor([7, 3])])
    settings = dict(rows=rows, vocab_size=COLUMNS - 2, entropy_gradient=entropy)
    labels.clamp_(max=COLUMNS - 3)
    loss = Loss(ROWS, dtype, entropy)
    whole, once = run(op, hidden, weight, labels, loss, 2**30, main_grad, **settings)
    parts, blocks = run(op, hidden, weight, labels, loss, some(dtype), main_grad, **settings)
    assert not once and len(blocks) == 4 and blocks[0].start == 0 and blocks[-1].stop == ROWS
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = reference(x[rows], w, labels, vocab_size=COLUMNS - 2)
    Loss(ROWS, torch.float64, entropy)(*exact, slice(None)).backward()
    for got, want in zip(parts[2:], (x.grad, w.grad)):
        torch.testing.assert_close(got.double(), want, atol=10 * tolerance, rtol=10 * tolerance)
    assert not parts[2][ROWS - 2 :].any()


@ops
def test_another_gradient_than_the_loss_s_is_refused(op):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    with pytest.raises(RuntimeError, match="differs from that of the loss"):
        run(
            op,
            hidden,
            weight,
            labels,
            Loss(ROWS, torch.float32),
            some(torch.float32),
            factor=2.0,
        )
    configure(keep_logits_bytes=some(torch.float32))
    x = hidden.clone().requires_grad_()
    loss = Loss(ROWS, torch.float32)
    found = op(x, weight, labels, with_entropy=True, loss=loss)
    total = loss(found.logprobs, found.entropy, slice(None))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        total.backward()


def test_the_loss_is_asked_only_where_blocks_are_needed():
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)

    def never(logprobs, entropy, rows):
        raise AssertionError("two passes do not ask")

    configure(keep_logits_bytes=some(torch.float32))
    with torch.no_grad():
        linear_logprob(hidden, weight, labels, loss=never)
    for keep in (0, some(torch.float32, 3), 2**30):  # nothing, less than a block's least, everything
        configure(keep_logits_bytes=keep)
        linear_logprob(hidden.requires_grad_(), weight, labels, loss=never).logprobs.sum().backward()


def test_a_loss_that_is_constant_gives_no_gradient():
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    configure(keep_logits_bytes=some(torch.float32))
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    found = linear_logprob(x, w, labels, loss=lambda logprobs, entropy, rows: logprobs.new_zeros(()))
    (found.logprobs * 0.0).sum().backward()
    assert not x.grad.any() and not w.grad.any()

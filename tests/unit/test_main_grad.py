"""dW straight into Megatron's main_grad: exact, accumulated over micro-batches, unseen by the wrapper's hook."""

import gc
import importlib.util
import os
import weakref

import pytest
import torch
from helpers.logprob import gradients, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_laser.ops import add_weight_gradient_to_main_grad, linear_logprob, torch_backend


def parameter(weight, main_dtype=torch.float32, zero_out=False):
    """A parameter as Megatron's DistributedDataParallel leaves it, with something in main_grad already."""
    result = torch.nn.Parameter(weight.clone())
    result.main_grad = torch.full(weight.shape, 0.25, dtype=main_dtype)
    result.grad_added_to_main_grad = False
    if zero_out:
        result.zero_out_wgrad = True
    return result


def backends():
    interpreted = importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1"
    return ["torch", *(["triton"] if interpreted else [])]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_main_grad_gets_the_unrounded_gradient_of_every_micro_batch(backend, dtype, main_dtype):
    hidden, weight, labels = inputs(rows=19, columns=40, dtype=dtype)
    _, _, exact = gradients(
        lambda x, w: linear_logprob(x, w, labels.clamp(max=36), vocab_size=37),
        hidden.double(),
        weight.double(),
    )
    marked = parameter(weight, main_dtype)
    add_weight_gradient_to_main_grad(marked)
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(19, generator=generator, dtype=torch.float64).float()
    for _ in range(2):
        result = linear_logprob(hidden, marked, labels.clamp(max=36), vocab_size=37, backend=backend)
        (result.logprobs * factor).sum().backward()
    assert marked.grad_added_to_main_grad and marked.grad.dtype == dtype
    added = marked.main_grad.double() - 0.25
    assert not added[37:].any()
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if main_dtype == torch.float32 else {"atol": 0.1, "rtol": 2**-6}
    if dtype == torch.bfloat16 and backend == "torch":
        tolerance["atol"] = max(tolerance["atol"], 1e-4)
    torch.testing.assert_close(added, 2 * exact, **tolerance)


def test_the_gradient_for_autograd_is_zero_where_megatron_reads_it():
    hidden, weight, labels = inputs()
    marked = parameter(weight, zero_out=True)
    add_weight_gradient_to_main_grad(marked)
    linear_logprob(hidden, marked, labels).logprobs.sum().backward()
    assert not marked.grad.any() and (marked.main_grad != 0.25).any()


def test_without_the_mark_or_the_wrapper_the_gradient_goes_to_autograd():
    hidden, weight, labels = inputs()
    _, _, expected = gradients(lambda x, w: linear_logprob(x, w, labels), hidden, weight)
    unmarked = parameter(weight)
    bare = torch.nn.Parameter(weight.clone())
    add_weight_gradient_to_main_grad(bare)
    for one in (unmarked, bare):
        factor = torch.randn(37, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        (linear_logprob(hidden, one, labels).logprobs * factor).sum().backward()
        torch.testing.assert_close(one.grad, expected)
    assert (unmarked.main_grad == 0.25).all() and not unmarked.grad_added_to_main_grad


@pytest.mark.parametrize("tile_bytes", [4 * 60, 4 * 500])
def test_tiles_and_row_blocks_do_not_change_main_grad(tile_bytes):
    hidden, weight, labels = inputs()
    grads = []
    for size in (tile_bytes, 2**20):
        marked = parameter(weight)
        add_weight_gradient_to_main_grad(marked)
        torch_backend.linear_logprob(hidden, marked, labels, tile_bytes=size).logprobs.sum().backward()
        grads.append(marked.main_grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_no_rows_leave_main_grad_alone():
    hidden, weight, labels = inputs(rows=0)
    marked = parameter(weight)
    add_weight_gradient_to_main_grad(marked)
    linear_logprob(hidden, marked, labels).logprobs.sum().backward()
    assert (marked.main_grad == 0.25).all() and marked.grad_added_to_main_grad


class Made(TorchDispatchMode):
    """Elements of the storages that operations made."""

    def __init__(self):
        super().__init__()
        self.sizes, self._alive = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if torch.is_tensor(one) and one.untyped_storage().data_ptr() not in given:
                self.sizes.append(one.untyped_storage().nbytes() // one.element_size())
        return result


@pytest.mark.parametrize("zero_out", [False, True])
def test_no_tensor_of_the_weights_size_is_made(zero_out):
    hidden, weight, labels = inputs(rows=5, columns=400)
    marked = parameter(weight, zero_out=zero_out)
    for fused in (False, True):
        if fused:
            add_weight_gradient_to_main_grad(marked)
        marked.grad = None
        loss = torch_backend.linear_logprob(hidden, marked, labels, tile_bytes=4 * 500).logprobs.sum()
        with Made() as made:
            loss.backward()
        # Without main_grad the gradient itself is one: they are seen.
        assert (max(made.sizes) >= marked.numel()) is not fused
    assert marked.grad.stride() == (0, 0) and not marked.grad.any()


def test_a_tied_embeddings_gradient_is_the_only_one():
    hidden, weight, labels = inputs()
    marked = parameter(weight, zero_out=True)
    add_weight_gradient_to_main_grad(marked)
    loss = linear_logprob(hidden, marked, labels).logprobs.sum() + marked[3].sum()
    loss = loss + linear_logprob(hidden, marked, labels).logprobs.sum()
    loss.backward()
    expected = torch.zeros_like(weight)
    expected[3] = 1
    assert torch.equal(marked.grad, expected) and marked.grad.is_contiguous()


def test_the_parameter_is_not_kept_alive():
    hidden, weight, labels = inputs()
    marked = parameter(weight)
    add_weight_gradient_to_main_grad(marked)
    linear_logprob(hidden, marked, labels).logprobs.sum().backward()
    gone = weakref.ref(marked)
    del marked
    gc.collect()
    assert gone() is None

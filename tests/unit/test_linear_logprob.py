"""The log-prob op against log_softmax written out in float64."""

import pytest
import torch
from helpers.logprob import gradients, inputs, reference
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laser.ops import (
    IGNORE_LABEL,
    available_backends,
    check_labels,
    few_row_logprob,
    linear_logprob,
    torch_backend,
)


def assert_matches_reference(hidden, weight, labels, *, atol=1e-5, tile_bytes=None, **settings):
    """Both outputs and both gradients against float64, with and without the entropy."""
    op = linear_logprob
    if tile_bytes is not None:

        def op(*args, **kwargs):
            return torch_backend.linear_logprob(*args, tile_bytes=tile_bytes, **kwargs)

    exact = {key: value for key, value in settings.items() if key in ("inv_temperature", "vocab_size")}
    for with_entropy in (False, True):
        expected = gradients(
            lambda x, w, n=1 + with_entropy: reference(x, w, labels, **exact)[:n],
            hidden.double(),
            weight.double(),
        )
        actual = gradients(
            lambda x, w, on=with_entropy: op(x, w, labels, with_entropy=on, **settings), hidden, weight
        )
        for name, got, want in zip(("logprobs", "entropy"), actual[0], expected[0]):
            assert got.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-6, msg=name)
        for name, got, want in zip(("dX", "dW"), actual[1:], expected[1:]):
            assert got.dtype == hidden.dtype
            torch.testing.assert_close(got.double(), want, atol=10 * atol, rtol=1e-5, msg=name)


def test_values_and_gradients_match_float64():
    assert_matches_reference(*inputs())


@pytest.mark.parametrize("columns", [1, 2, 5, 123, 257])
def test_any_vocabulary_size_works(columns):
    assert_matches_reference(*inputs(rows=11, columns=columns), tile_bytes=4 * 50)


@pytest.mark.parametrize("tile_bytes", [1, 4 * 7, 4 * 60, 4 * 400])
def test_tiles_do_not_change_the_result(tile_bytes):
    assert_matches_reference(*inputs(), tile_bytes=tile_bytes, vocab_size=50)


def test_temperature_of_all_rows_and_of_each_row():
    hidden, weight, labels = inputs()
    per_row = torch.linspace(0.25, 2.0, hidden.shape[0])
    assert_matches_reference(hidden, weight, labels, inv_temperature=0.6)
    assert_matches_reference(hidden, weight, labels, inv_temperature=per_row)
    assert_matches_reference(hidden, weight, labels, inv_temperature=per_row, tile_bytes=4 * 64)
    assert_matches_reference(hidden, weight, labels, inv_temperature=per_row.double())


def test_padded_columns_have_no_probability_and_no_gradient():
    hidden, weight, labels = inputs(columns=64)
    weight[50:] *= 100  # would win the softmax if it were not masked
    labels = labels.clamp(max=49)
    assert_matches_reference(hidden, weight, labels, vocab_size=50)
    _, _, grad = gradients(lambda x, w: linear_logprob(x, w, labels, vocab_size=50), hidden, weight)
    assert not grad[50:].any()


def test_labels_far_below_the_maximum_keep_full_precision():
    hidden, weight, labels = inputs(rows=64, columns=97)
    weight[:, 0] = 0.0
    weight[3, 0] = -1.0  # column 3 is the score token: 20 to 30 nats under the others
    hidden[:, 0] = torch.linspace(18.0, 26.0, 64)
    labels[:] = 3
    below = reference(hidden, weight, labels)[0]
    assert below.max() < -15 and below.min() < -27
    assert_matches_reference(hidden, weight, labels)


@pytest.mark.parametrize("tile_bytes", [None, 4 * 100])
def test_logits_shifted_by_minus_200(tile_bytes):
    hidden, weight, labels = inputs()
    # Coarse values make hidden @ weight exact in float32, so what is measured is the softmax.
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    hidden = torch.cat([hidden, torch.full((hidden.shape[0], 1), -200.0)], dim=1)
    weight = torch.cat([weight, torch.ones(weight.shape[0], 1)], dim=1)
    expected, entropy = reference(hidden, weight, labels)
    kwargs = {} if tile_bytes is None else {"tile_bytes": tile_bytes}
    actual = torch_backend.linear_logprob(hidden, weight, labels, with_entropy=True, **kwargs)
    torch.testing.assert_close(actual.logprobs.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(actual.entropy.double(), entropy, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("tile_bytes", [None, 4 * 20])
def test_one_row_and_no_rows(tile_bytes):
    hidden, weight, _ = inputs(rows=1)
    assert_matches_reference(hidden, weight, torch.tensor([7]), tile_bytes=tile_bytes)
    hidden, weight, labels = inputs(rows=0)
    outputs, dx, dw = gradients(lambda x, w: linear_logprob(x, w, labels, with_entropy=True), hidden, weight)
    assert [tuple(out.shape) for out in outputs] == [(0,), (0,)]
    assert dx.shape == hidden.shape and not dw.any()
    assert few_row_logprob(hidden, weight, labels).shape == (0,)


def test_rows_without_label_give_zero_and_no_gradient():
    hidden, weight, labels = inputs()
    labels[:] = IGNORE_LABEL
    outputs, dx, dw = gradients(lambda x, w: linear_logprob(x, w, labels, with_entropy=True), hidden, weight)
    assert not any(tensor.any() for tensor in (*outputs, dx, dw))


def test_gradcheck_in_float64():
    hidden, weight, labels = inputs(rows=6, hidden_size=4, columns=9, dtype=torch.float64)
    per_row = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    for tile_bytes in (8 * 54, 8 * 10):

        def function(x, w, tile_bytes=tile_bytes):
            return tuple(
                torch_backend.linear_logprob(
                    x,
                    w,
                    labels,
                    inv_temperature=per_row,
                    vocab_size=8,
                    with_entropy=True,
                    tile_bytes=tile_bytes,
                )
            )

        labels.clamp_(max=7)
        assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("tile_bytes", [None, 4 * 100])
def test_bfloat16_inputs_accumulate_in_float32(tile_bytes):
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    kwargs = {} if tile_bytes is None else {"tile_bytes": tile_bytes}
    expected = gradients(lambda x, w: reference(x, w, labels), hidden.double(), weight.double())
    actual = gradients(
        lambda x, w: torch_backend.linear_logprob(x, w, labels, with_entropy=True, **kwargs),
        hidden,
        weight,
    )
    for got, want in zip(actual[0], expected[0]):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-6)
    for got, want in zip(actual[1:], expected[1:]):
        assert got.dtype == torch.bfloat16
        # Rounded once, at the end: half a unit in the last place (2^-9), not an accumulated error.
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed_are_computed(wanted):
    hidden, weight, labels = inputs()
    _, dx, dw = gradients(lambda x, w: linear_logprob(x, w, labels), hidden, weight)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    factor = torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = linear_logprob(hidden, weight, labels)
    assert result.entropy is None
    (result.logprobs * factor.float()).sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted
    torch.testing.assert_close(hidden.grad if wanted[0] else weight.grad, dx if wanted[0] else dw)


def test_gradient_of_the_entropy_alone():
    hidden, weight, labels = inputs()
    for tensor in (hidden, weight):
        tensor.requires_grad_()
    linear_logprob(hidden, weight, labels, with_entropy=True).entropy.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    reference(*exact, labels)[1].sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, atol=1e-5, rtol=1e-5)


def test_two_calls_are_bitwise_equal():
    hidden, weight, labels = inputs(rows=200, columns=301)
    first, second = (
        gradients(
            lambda x, w: torch_backend.linear_logprob(x, w, labels, with_entropy=True, tile_bytes=9000),
            hidden,
            weight,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip([*first[0], *first[1:]], [*second[0], *second[1:]]))


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that an operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_rows_times_vocabulary_exists(dtype):
    rows, hidden_size, columns, tile_bytes = 512, 8, 1024, 64 * 1024
    hidden, weight, labels = inputs(rows, hidden_size, columns, dtype)
    with LargestTensor() as dense:
        reference(hidden, weight, labels)
    assert dense.nbytes >= rows * columns * 4  # the hook sees the tensor that must not exist
    with LargestTensor() as seen:
        gradients(
            lambda x, w: torch_backend.linear_logprob(x, w, labels, with_entropy=True, tile_bytes=tile_bytes),
            hidden,
            weight,
        )
        torch_backend.few_row_logprob(hidden, weight, labels, tile_bytes=tile_bytes)
    assert 0 < seen.nbytes <= tile_bytes < rows * columns * 4


def test_few_row_logprob_is_linear_logprob_without_gradient():
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    result = few_row_logprob(hidden, weight, labels, vocab_size=53)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert torch.equal(result, linear_logprob(hidden, weight, labels, vocab_size=53).logprobs)


def test_labels_outside_the_vocabulary_are_named_on_request_and_nan_without():
    hidden, weight, labels = inputs()
    check_labels(labels, 53)
    labels[4] = 53
    with pytest.raises(ValueError, match=r"labels\[4\] = 53"):
        check_labels(labels, 53)
    assert linear_logprob(hidden, weight, labels).logprobs.isnan().nonzero().tolist() == [[4]]


def test_an_unknown_backend_is_refused_with_the_available_ones():
    hidden, weight, labels = inputs()
    assert "torch" in available_backends(hidden.device)
    named = linear_logprob(hidden, weight, labels, backend="torch").logprobs
    assert torch.equal(named, linear_logprob(hidden, weight, labels).logprobs)
    for call in (linear_logprob, few_row_logprob):
        with pytest.raises(ValueError, match=r"backend='cutlass'.*auto, .*torch"):
            call(hidden, weight, labels, backend="cutlass")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(37, 1, 16)}, r"\[rows, H\]"),
        ({"hidden": torch.zeros(37, 15)}, "same H"),
        ({"hidden": torch.zeros(37, 16, dtype=torch.bfloat16)}, "one floating-point dtype"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, r"labels is \(36,\)"),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, "int64"),
        ({"vocab_size": 54}, "vocab_size=54: expected 1 to 53"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"inv_temperature": torch.ones(36)}, r"constant tensor \[37\]"),
        ({"inv_temperature": torch.ones(37, requires_grad=True)}, "requires_grad=True"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": hidden, "weight": weight, "labels": labels, **change})

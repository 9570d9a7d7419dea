"""Log-probs over sets of columns against float64: values, dX, dW; chunks, main_grad, and what is refused."""

import pytest
import torch
from helpers.logprob import gradients, inputs

from megatron_laser.ops import (
    IGNORE_LABEL,
    Sets,
    add_weight_gradient_to_main_grad,
    configure,
    linear_logprob,
    set_logprob,
)


def sets_of(labels, columns, seed=0, most=9):
    """A set of 1 to `most` columns for each row, with its label."""
    generator = torch.Generator().manual_seed(seed)
    members = []
    for label in labels.tolist():
        size = int(torch.randint(1, most + 1, (), generator=generator))
        own = torch.randperm(columns, generator=generator)[:size].tolist()
        members.append(list(dict.fromkeys([*own[: size // 2], max(label, 0), *own[size // 2 :]])))
    return members


def as_sets(members):
    counts = torch.tensor([0, *map(len, members)])
    return Sets(torch.tensor([i for one in members for i in one], dtype=torch.int64), counts.cumsum(0))


def plain(hidden, weight, labels, members, inv_temperature):
    """In float64, row by row."""
    logits = hidden.double() @ weight.double().T * inv_temperature.double().unsqueeze(1)
    rows = [
        torch.zeros((), dtype=torch.float64)
        if label < 0
        else row[label] - row[torch.tensor(own)].logsumexp(0)
        for row, label, own in zip(logits, labels.tolist(), members)
    ]
    return torch.stack(rows) if rows else logits.sum(1)


@pytest.fixture(params=[None, 1], ids=["one chunk", "a row each"])
def chunks(request):
    before = configure(**({} if request.param is None else {"tile_bytes": request.param}))
    yield
    configure(tile_bytes=before.tile_bytes)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)]
)
def test_values_and_gradients_are_those_of_the_softmax_over_the_set(chunks, dtype, tolerance):
    hidden, weight, labels = inputs(rows=37, columns=53, dtype=dtype, scale=2.0)
    members = sets_of(labels, 50)  # columns from 50 on are padding
    labels = labels.clamp(max=49)
    members = [sorted({*own, max(label, 0)}) for own, label in zip(members, labels.tolist())]
    inv_temperature = torch.linspace(0.5, 1.5, 37)

    def ours(x, w):
        return [set_logprob(x, w, labels, as_sets(members), inv_temperature=inv_temperature, vocab_size=50)]

    (found,), grad_hidden, grad_weight = gradients(ours, hidden, weight)
    (expected,), exact_hidden, exact_weight = gradients(
        lambda x, w: [plain(x, w, labels, members, inv_temperature)], hidden.double(), weight.double()
    )
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    if dtype == torch.bfloat16:  # the gradients are rounded to it
        tolerance = 2**-7
    torch.testing.assert_close(grad_hidden.double(), exact_hidden, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grad_weight.double(), exact_weight, atol=tolerance, rtol=tolerance)
    assert not grad_weight[50:].any()


def test_the_set_of_all_columns_is_the_whole_distribution():
    hidden, weight, labels = inputs()
    everything = [list(range(53))] * 37
    ours = gradients(lambda x, w: [set_logprob(x, w, labels, as_sets(everything))], hidden, weight)
    whole = gradients(lambda x, w: [linear_logprob(x, w, labels).logprobs], hidden, weight)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_a_confident_token_has_the_exact_gradient_of_its_own_logit():
    """1 - p of a p that was rounded to 1 would be 0."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[10.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    set_logprob(hidden, weight, torch.tensor([0]), as_sets([[0, 1]])).sum().backward()
    assert weight.grad[0].item() == pytest.approx(4.539787e-5, rel=2**-8)  # 1 / (1 + e^10)


def test_a_token_that_was_the_only_one_has_log_prob_0_and_no_gradient():
    hidden, weight, labels = inputs(rows=5)
    labels = labels.clamp(min=3)
    alone = as_sets([[label] for label in labels.tolist()])
    (found,), grad_hidden, grad_weight = gradients(
        lambda x, w: [set_logprob(x, w, labels, alone)], hidden, weight
    )
    assert not found.any() and not grad_hidden.any() and not grad_weight.any()


def test_rows_are_chosen_among_tokens_and_a_token_may_have_several_labels():
    hidden, weight, _ = inputs(rows=9)
    rows, labels = torch.tensor([1, 4, 4, 8]), torch.tensor([5, 6, 7, 8])
    members = sets_of(labels, 53)
    ones = torch.ones(4)
    ours = gradients(lambda x, w: [set_logprob(x, w, labels, as_sets(members), rows=rows)], hidden, weight)
    exact = gradients(
        lambda x, w: [plain(x[rows], w, labels, members, ones)], hidden.double(), weight.double()
    )
    for got, want in zip((*ours[0], *ours[1:]), (*exact[0], *exact[1:])):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_no_rows_and_no_labels_give_gradients_of_zero():
    hidden, weight, labels = inputs(rows=4)
    for rows, own in ((torch.zeros(0, dtype=torch.int64), labels[:0]), (None, labels * 0 + IGNORE_LABEL)):
        hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
        members = as_sets([[0, 1]] * len(own))
        found = set_logprob(hidden, weight, own, members, rows=rows)
        found.sum().backward()
        assert found.tolist() == [0.0] * len(own)
        assert not hidden.grad.any() and not weight.grad.any()


def test_the_gradient_goes_to_main_grad_beside_that_of_the_other_op():
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    members = as_sets(sets_of(labels, 53))

    def both(x, w):
        return [set_logprob(x, w, labels, members), linear_logprob(x, w, labels).logprobs]

    _, _, exact = gradients(both, hidden.double(), weight.double())
    marked = torch.nn.Parameter(weight.clone())
    marked.main_grad, marked.grad_added_to_main_grad = torch.full(weight.shape, 0.25), False
    add_weight_gradient_to_main_grad(marked)
    _, _, untouched = gradients(both, hidden, weight)  # no mark: autograd's
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(37, generator=generator, dtype=torch.float64).float() for _ in range(2)]
    sum((out * factor).sum() for out, factor in zip(both(hidden, marked), factors)).backward()
    torch.testing.assert_close(marked.main_grad.double() - 0.25, exact, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(untouched.double(), exact, atol=2e-2, rtol=2**-6)
    assert marked.grad_added_to_main_grad and not (marked.grad != 0).any()


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([[1], [2]], [0, 1, 2, 3], "sets.offsets"),
        ([[1], [2]], [0, 2, 1], "sets.offsets"),
        ([[1], [2]], [0, 1], "sets.offsets"),
        ([[1], [53]], [0, 1, 2], "expected 0 to 52"),
        ([[1], [3]], [0, 1, 2], r"labels\[1\] = 2 is not in the set"),
    ],
)
def test_sets_that_do_not_fit_are_refused(ids, offsets, message):
    hidden, weight, _ = inputs(rows=2)
    sets = Sets(torch.tensor([i for one in ids for i in one]), torch.tensor(offsets))
    with pytest.raises(ValueError, match=message):
        set_logprob(hidden, weight, torch.tensor([1, 2]), sets)

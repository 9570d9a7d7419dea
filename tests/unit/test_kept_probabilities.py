"""Probabilities kept for the backward, in plain torch and in Triton's interpreter: values, products, memory."""

import dataclasses
import gc
import weakref

import pytest
import torch
from helpers.breadth import combinations
from helpers.logprob import Products, gradients, inputs, reference

from megatron_laser.ops import configure, memory, torch_backend
from megatron_laser.ops.device import interpreted, kernels_refuse
from megatron_laser.ops.kept import Kept
from megatron_laser.ops.passes import apply

ROWS, HIDDEN, COLUMNS = 37, 16, 300
TILE = 4 * ROWS * 64
ALL, SOME, NOTHING = 2**30, 8 * ROWS * 140, 0


def torch_engine():
    return torch_backend.TorchEngine(TILE)


def triton_engine():
    from megatron_laser.ops.triton.engine import ChunkedEngine

    return ChunkedEngine(block=64, min_columns=8, kept_tile_bytes=4 * ROWS * 130)


ENGINES = {"torch": torch_engine}
if kernels_refuse(torch.device("cpu")) is None and interpreted():
    ENGINES["triton"] = triton_engine
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@pytest.fixture(autouse=True)
def settings():
    before = configure(tile_bytes=TILE, keep_logits_bytes=ALL)
    yield
    configure(**dataclasses.asdict(before))
    memory.forget_keep_budgets()


def op(engine, labels, **settings):
    return lambda x, w: apply(engine(), x, w, labels, **settings)


def assert_exact(engine, hidden, weight, labels, gradient_rtol=None, **settings):
    """Values to 1e-5 nats, gradients to 2e-5, or to the rounding of bfloat16, of each row's norm."""
    expected = gradients(
        lambda x, w: reference(x, w, labels, **settings)[:1], hidden.double(), weight.double()
    )
    actual = gradients(op(engine, labels, **settings), hidden, weight)
    torch.testing.assert_close(actual[0][0].double(), expected[0][0], atol=1e-5, rtol=1e-6)
    limit = gradient_rtol or (2**-7 if hidden.dtype == torch.bfloat16 else 2e-5)
    for got, want, rows in zip(actual[1:], expected[1:], (True, not gradient_rtol)):
        if not rows:
            got, want = got.reshape(1, -1), want.reshape(1, -1)
        off, size = (got.double() - want).norm(dim=1), want.norm(dim=1)
        worst = (off - limit * size - 1e-6 * size.max()).argmax()
        assert off[worst] <= limit * size[worst] + 1e-6 * size.max(), (worst, off[worst], size[worst])
    return actual


@combinations(
    lambda engine, keep, dtype: (
        engine == "torch" or (keep, dtype) in (("some", "float32"), ("all", "bfloat16"))
    ),
    engine=ENGINES,
    keep={"all": ALL, "some": SOME, "nothing": NOTHING},
    dtype={"float32": torch.float32, "bfloat16": torch.bfloat16},
)
def test_values_and_gradients_match_float64(engine, keep, dtype):
    configure(keep_logits_bytes=keep)
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS, dtype)
    labels.clamp_(max=COLUMNS - 4)
    temperature = torch.linspace(0.4, 1.8, ROWS)
    assert_exact(engine, hidden, weight, labels, inv_temperature=temperature, vocab_size=COLUMNS - 3)


@engines
@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (1, 1), (5, 7), (19, 131)])
def test_odd_shapes(engine, rows, columns):
    assert_exact(engine, *inputs(rows, HIDDEN, columns))


def test_float64_is_exact():
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS, torch.float64)
    for keep in (ALL, SOME):
        configure(keep_logits_bytes=keep)
        assert_exact(torch_engine, hidden, weight, labels, gradient_rtol=1e-10)


@engines
def test_labels_30_nats_down_and_confident_tokens(engine):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS, torch.bfloat16)
    hidden, weight = hidden * 0.3, weight * 0.3
    weight[:, 0] = 0.0
    weight[3, 0], weight[290, 0] = -1.0, 1.0
    hidden[:, 0] = torch.linspace(18.0, 26.0, ROWS).bfloat16()
    # Confident, but not beyond what float32 log-probs tell apart.
    for label, scale, low, high in ((3, 1.0, -70, -30), (290, 0.5, -0.1, -1e-5)):
        labels[:] = label
        hidden[:, 0] *= scale
        exact = reference(hidden, weight, labels)[0]
        assert low < exact.min() and exact.max() <= high
        # A row of dW is a sum of opposite signs: there the norm of all of it counts.
        assert_exact(engine, hidden, weight, labels, gradient_rtol=2**-6)


@engines
@pytest.mark.parametrize(("above", "products"), [(60.0, 3), (85.0, 4)])
def test_a_maximum_far_above_the_first_slice_s(engine, above, products):
    """Beyond 70 nats the call recomputes."""
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    hidden, weight = hidden * 0.1, weight * 0.1
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    weight[280, 0] = above
    labels[1:9] = 280
    with Products(ROWS, HIDDEN, COLUMNS) as counted:
        assert_exact(engine, hidden, weight, labels)
    assert counted.count == pytest.approx(products + 3, rel=0.4)  # and the reference's own three
    with Products(ROWS, HIDDEN, COLUMNS) as counted:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (op(engine, labels)(x, w).logprobs * torch.arange(1.0, ROWS + 1)).where(
            labels >= 0, 0
        ).sum().backward()
    labelled = float((labels >= 0).float().mean())
    assert counted.count == pytest.approx(1 + (products - 1) * labelled, rel=1e-6)


@engines
@pytest.mark.parametrize(("keep", "products"), [(ALL, 3), (SOME, None), (NOTHING, 4)])
def test_products_of_a_call(engine, keep, products):
    """Three where everything is kept, four where nothing is, three and the share that is recomputed between."""
    configure(keep_logits_bytes=keep)
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    labels.clamp_(min=0)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    with Products(ROWS, HIDDEN, COLUMNS) as counted:
        loss = op(engine, labels)(x, w).logprobs.sum()
        columns = loss.grad_fn.next_functions[0][0].kept
        columns = 0 if columns is None else columns.columns
        loss.backward()
    assert counted.count == pytest.approx(3 + (COLUMNS - columns) / COLUMNS)
    if products is None:
        assert 0 < columns < COLUMNS
    else:
        assert counted.count == pytest.approx(products)


@combinations(
    lambda engine, keep: engine == "torch" or keep == "all",
    engine=ENGINES,
    keep={"all": ALL, "nothing": NOTHING},
)
def test_rows_without_a_gradient_cost_no_products(engine, keep):
    configure(keep_logits_bytes=keep)
    hidden, weight, labels = inputs(36, HIDDEN, COLUMNS)
    labels.clamp_(min=0)
    factor = torch.linspace(0.5, 2, 36) * (torch.arange(36) % 2)
    results = []
    for _ in range(2):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = op(engine, labels)(x, w).logprobs
        with Products(36, HIDDEN, COLUMNS) as counted:
            (found * factor).sum().backward()
        assert counted.count == pytest.approx((2 if keep else 3) / 2)
        assert not x.grad[::2].any()
        results.append((x.grad, w.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results))
    xd, wd = hidden.double().requires_grad_(), weight.double().requires_grad_()
    (reference(xd, wd, labels)[0] * factor.double()).sum().backward()
    torch.testing.assert_close(results[0][0].double(), xd.grad, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1].double(), wd.grad, atol=2e-5, rtol=1e-5)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = op(engine, labels)(x, w).logprobs
    tiles = found.grad_fn.kept
    with Products(ROWS, HIDDEN, COLUMNS) as counted:
        (found * 0.0).sum().backward()
    assert counted.done == 0 and not x.grad.any() and not w.grad.any()
    assert tiles is None or tiles.nbytes == 0  # given back though nobody took them
    (op(engine, labels)(x, w).logprobs * torch.nan).sum().backward()
    assert x.grad.isnan().all() and w.grad.isnan().all()  # a NaN is no zero


@engines
def test_an_entropy_gradient_works_on_what_is_kept(engine):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    expected = gradients(lambda x, w: reference(x, w, labels), hidden.double(), weight.double())
    actual = gradients(op(engine, labels, with_entropy=True), hidden, weight)
    for got, want in zip([*actual[0], *actual[1:]], [*expected[0], *expected[1:]]):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    # A confident token's 1 - p comes from its log-prob, not from a rounded p.
    sure = (8 * torch.eye(HIDDEN)[:8]).bfloat16()
    columns = torch.cat([1.5 * torch.eye(HIDDEN), torch.zeros(COLUMNS - HIDDEN, HIDDEN)]).bfloat16()
    labels = torch.arange(8)
    expected = gradients(lambda x, w: reference(x, w, labels), sure.double(), columns.double())
    actual = gradients(op(engine, labels, with_entropy=True), sure, columns)
    assert 1e-4 < -expected[0][0].max() < 1e-2
    off = (actual[1].double() - expected[1]).norm(dim=1)
    assert (off <= 2**-6 * expected[1].norm(dim=1)).all()
    x = hidden.clone().requires_grad_()
    labels = inputs(ROWS, HIDDEN, COLUMNS)[2]
    constant = op(engine, labels, with_entropy=True, entropy_gradient=False)(x, weight).entropy
    assert not constant.requires_grad


@engines
def test_tiles_are_released_as_the_backward_uses_them(engine, monkeypatch):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = op(engine, labels)(x, w).logprobs.sum()
    kept = loss.grad_fn.next_functions[0][0].kept
    tiles = [weakref.ref(tile) for _, tile in kept._tiles]
    assert len(tiles) > 1 and kept.columns == COLUMNS and kept.nbytes >= 4 * ROWS * COLUMNS
    del kept
    alive, take = [], Kept.take

    def watched(self):
        for item in take(self):
            alive.append(sum(tile() is not None for tile in tiles))
            yield item
            del item

    monkeypatch.setattr(Kept, "take", watched)
    loss.backward(retain_graph=True)
    gc.collect()
    assert not any(tile() is not None for tile in tiles)
    # One more than is left may be on its way out when the next one is asked for.
    assert alive == sorted(alive, reverse=True) and alive[0] >= len(tiles) - 1 and alive[-1] <= 1
    first = x.grad.clone()
    loss.backward()  # recomputes
    torch.testing.assert_close(x.grad, 2 * first, atol=1e-4, rtol=1e-4)


@engines
@pytest.mark.parametrize("failing", [0, 1])
def test_without_memory_for_a_tile_the_rest_is_recomputed(engine, failing, monkeypatch):
    room_for, calls = Kept.room_for, []

    def scarce(self, columns):
        if columns.start in self._groups:
            calls.append(columns)
            if len(calls) > failing:
                raise torch.OutOfMemoryError("none left")
        return room_for(self, columns)

    monkeypatch.setattr(Kept, "room_for", scarce)
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS)
    before = memory.keep_budget(hidden.device)
    assert_exact(engine, hidden, weight, labels)
    assert len(calls) == failing + 1 and memory.keep_budget(hidden.device) < before

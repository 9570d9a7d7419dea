"""Kept probabilities at their limits: budgets, maxima in other shards, and blocks of rows with the loss inside."""

import dataclasses
import weakref

import pytest
import torch
from helpers.logprob import Products, gradients, inputs, reference

from megatron_laser.ops import autograd, configure, memory, torch_backend
from megatron_laser.ops.collectives import GatheredRows
from megatron_laser.ops.device import interpreted, kernels_refuse
from megatron_laser.ops.kept import Kept
from megatron_laser.ops.passes import apply
from megatron_laser.ops.statistics import merged
from megatron_laser.ops.tiled_engine import TiledEngine
from megatron_laser.ops.tiles import Shard

ROWS, HIDDEN, COLUMNS = 36, 16, 384
TILE = 8 * ROWS * 64  # 64 columns in float64, 128 in float32
ALL, NOTHING = 2**30, 0


def torch_engine(tile=TILE):
    return torch_backend.TorchEngine(tile)


def triton_engine(tile=TILE):
    from megatron_laser.ops.triton.engine import ChunkedEngine

    return ChunkedEngine(block=64, min_columns=8, kept_tile_bytes=tile)


ENGINES = {"torch": torch_engine}
if kernels_refuse(torch.device("cpu")) is None and interpreted():
    ENGINES["triton"] = triton_engine
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def settings():
    before = configure(tile_bytes=TILE, keep_logits_bytes=ALL, min_block_rows=4)
    yield
    configure(**dataclasses.asdict(before))
    memory.forget_keep_budgets()


@pytest.fixture
def made(monkeypatch):
    """(object, bytes of its tiles after the forward) of every `Kept` that had to do with an lse."""
    found, compare = [], Kept.compare

    def noted(self, lse):
        found.append((self, self.nbytes))
        compare(self, lse)

    monkeypatch.setattr(Kept, "compare", noted)
    return found


def tolerance(dtype):
    """Of values of about 1."""
    return {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]


def assert_near(got, want, dtype):
    limit = tolerance(dtype)
    torch.testing.assert_close(got.double(), want, atol=limit * max(1, float(want.abs().max())), rtol=limit)


def in_float64(tensor):
    return tensor.to(torch.float64, copy=True).requires_grad_()


def labelled(dtype=torch.float32):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS, dtype)
    return hidden, weight, labels.clamp(min=0)


@engines
@dtypes
@pytest.mark.parametrize("slices", [0, 1, 3, 6])
def test_entropy_temperature_and_padding_with_any_part_kept(engine, dtype, slices, made):
    hidden, weight, labels = inputs(ROWS, HIDDEN, COLUMNS, dtype)
    labels.clamp_(max=COLUMNS - 4)
    columns = {"vocab_size": COLUMNS - 3, "inv_temperature": torch.linspace(0.4, 1.8, ROWS, dtype=dtype)}
    budget = slices * TILE
    configure(keep_logits_bytes=budget)
    expected = gradients(lambda x, w: reference(x, w, labels, **columns), hidden.double(), weight.double())
    actual = gradients(
        lambda x, w: apply(engine(), x, w, labels, with_entropy=True, **columns), hidden, weight
    )
    for got, want in zip([*actual[0], *actual[1:]], [*expected[0], *expected[1:]]):
        assert_near(got, want, dtype)
    assert [nbytes for _, nbytes in made] == [min(budget, ROWS * COLUMNS * dtype.itemsize)] * bool(slices)


@engines
@dtypes
@pytest.mark.parametrize(("above", "kept"), [(5.0, True), (60.0, True), (90.0, False)])
def test_a_maximum_in_another_shard(engine, dtype, above, kept, monkeypatch):
    """This shard has the first half of the columns; a column of the other is far above all of them."""
    hidden, weight, labels = labelled(dtype)
    hidden, weight = hidden * 0.3, weight * 0.3
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    half = COLUMNS // 2
    weight[half + 7, 0] = above
    labels = labels % half
    other = Shard(half, half, COLUMNS)

    def with_the_other(local, group):
        problem = autograd.Problem(GatheredRows(hidden, None), weight[half:], labels, 1.0, other, False)
        theirs, _ = torch_engine().statistics(problem, for_backward=False)
        return merged(torch.stack([torch.stack(part[:3]) for part in (local, theirs)]))

    factor = torch.linspace(-1.0, 2.0, ROWS, dtype=dtype)
    xd, wd = in_float64(hidden), in_float64(weight)
    z = xd @ wd.T
    exact = z.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    dz = factor.double()[:, None] * (torch.eye(COLUMNS)[labels] - z.detach().softmax(1))[:, :half]
    monkeypatch.setattr(autograd, "reduced", with_the_other)
    x, w = hidden.clone().requires_grad_(), weight[:half].clone().requires_grad_()
    found = apply(engine(), x, w, labels).logprobs
    with Products(ROWS, HIDDEN, half) as counted:
        (found * factor).sum().backward()
    assert counted.count == pytest.approx(2 if kept else 3)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-6)
    assert_near(x.grad, dz @ wd.detach()[:half], dtype)
    assert_near(w.grad, dz.T @ xd.detach(), dtype)


@engines
def test_tiles_that_cannot_be_used_are_gone_before_the_logits_are_made_again(engine, made, monkeypatch):
    hidden, weight, labels = labelled()
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    weight[-1, 0] = 90.0
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = apply(engine(), x, w, labels).logprobs.sum()
    ((kept, nbytes),) = made
    tiles = [weakref.ref(tile) for _, tile in kept._tiles]
    assert nbytes >= ROWS * COLUMNS * 4 and len(tiles) > 1
    seen, again = [], TiledEngine._from_logits

    def watched(self, *args):
        seen.append(sum(tile() is not None for tile in tiles))
        again(self, *args)

    monkeypatch.setattr(TiledEngine, "_from_logits", watched)
    loss.backward()
    assert seen == [0]


@engines
@pytest.mark.parametrize("keep", [ALL, NOTHING])
def test_a_few_rows_without_gradient_stay_in_the_products_and_get_exact_zeros(engine, keep):
    configure(keep_logits_bytes=keep)
    hidden, weight, labels = labelled()
    factor = torch.ones(ROWS)
    factor[[4, 20]] = 0.0  # fewer than are worth a copy of the others
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    found = apply(engine(), x, w, labels).logprobs
    with Products(ROWS, HIDDEN, COLUMNS) as counted:
        (found * factor).sum().backward()
    assert counted.count == pytest.approx(2 if keep else 3)
    assert not x.grad[[4, 20]].any() and x.grad[factor > 0].any(1).all()


@engines
def test_a_constant_entropy_needs_no_gradient_of_kept_tiles(engine, monkeypatch):
    hidden, weight, labels = labelled()
    runs, calls = [], []
    functions = type(engine()._functions)
    gradient = functions.gradient
    monkeypatch.setattr(functions, "gradient", lambda *args: (calls.append(1), gradient(*args)))
    for settings in ({"with_entropy": True, "entropy_gradient": False}, {}):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        apply(engine(), x, w, labels, **settings).logprobs.sum().backward()
        runs.append((x.grad, w.grad))
    assert not calls and all(torch.equal(one, other) for one, other in zip(*runs))
    x = hidden.clone().requires_grad_()
    apply(engine(), x, weight, labels, with_entropy=True).entropy.sum().backward()
    assert calls


@engines
@pytest.mark.parametrize("keep", [ALL, TILE])
def test_rows_in_any_order_and_more_than_once(engine, keep):
    configure(keep_logits_bytes=keep)
    for dtype in (torch.float32, torch.float64):
        hidden, weight, _ = labelled(dtype)
        rows = torch.tensor([30, 2, 2, 17, 2, 0, 30, 35])
        labels = torch.tensor([1, 2, 250, 9, 2, 287, 1, 100])
        expected = gradients(
            lambda x, w, rows=rows, labels=labels: reference(x.index_select(0, rows), w, labels)[:1],
            *(hidden.double(), weight.double()),
        )
        actual = gradients(
            lambda x, w, rows=rows, labels=labels: apply(engine(), x, w, labels, rows=rows), hidden, weight
        )
        for got, want in zip([*actual[0], *actual[1:]], [*expected[0], *expected[1:]]):
            assert_near(got, want, dtype)
        other = torch.ones(ROWS, dtype=torch.bool).index_fill(0, rows, False)
        assert not actual[1][other].any()


class SquaredError:
    """A sum over rows with a target for each; `weights` of 0 leave a row without gradient."""

    def __init__(self, dtype, weights=None):
        generator = torch.Generator().manual_seed(5)
        target = torch.randn(ROWS, generator=generator, dtype=torch.float64) - 4.0
        self.target = target.to(torch.float64 if dtype == torch.float64 else torch.float32)
        self.weights = torch.ones(ROWS) if weights is None else weights
        self.blocks = []

    def __call__(self, logprobs, entropy, rows):
        self.blocks.append(rows)
        return 0.05 * (self.weights[rows] * (logprobs - self.target[rows]) ** 2).sum()


def in_blocks(engine, hidden, weight, labels, loss, itemsize, **settings):
    """(log-probs, dX, dW, products) of a call whose budget is the probabilities of a third of the rows."""
    configure(keep_logits_bytes=ROWS // 3 * COLUMNS * itemsize)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with Products(ROWS, HIDDEN, COLUMNS) as counted:
        found = apply(engine(), x, w, labels, loss=loss, **settings).logprobs
        assert len(loss.blocks) == 3
        loss(found, None, slice(None)).backward()
    return found.detach(), x.grad, w.grad, counted.count


def exact(hidden, weight, labels, loss, **settings):
    xd, wd = in_float64(hidden), in_float64(weight)
    found = reference(xd, wd, labels, **settings)[0]
    loss(found, None, slice(None)).backward()
    return found.detach(), xd.grad, wd.grad


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_are_three_products_in_the_memory_of_one(engine, dtype, made):
    hidden, weight, labels = labelled(dtype)
    loss = SquaredError(dtype)
    temperature = torch.linspace(0.4, 1.8, ROWS)
    itemsize = engine().kept_dtype(hidden).itemsize
    *actual, products = in_blocks(engine, hidden, weight, labels, loss, itemsize, inv_temperature=temperature)
    assert products == pytest.approx(3)
    assert [nbytes for _, nbytes in made] == [ROWS // 3 * COLUMNS * itemsize] * 3
    assert not any(kept.nbytes for kept, _ in made)
    expected = exact(hidden, weight, labels, loss, inv_temperature=temperature)
    torch.testing.assert_close(actual[0].double(), expected[0], atol=1e-5, rtol=1e-6)
    for got, want in zip(actual[1:], expected[1:]):
        assert_near(got, want, dtype)
    again = in_blocks(
        *(engine, hidden, weight, labels, SquaredError(dtype), itemsize), inv_temperature=temperature
    )
    assert all(torch.equal(one, other) for one, other in zip(actual, again))


@engines
@dtypes
def test_blocks_with_few_or_no_gradients_multiply_less(engine, dtype):
    hidden, weight, labels = labelled(dtype)
    weights = torch.ones(ROWS)
    weights[:12], weights[12:24:2] = 0.0, 0.0  # no row of the first block, half of the second
    loss = SquaredError(dtype, weights)
    *actual, products = in_blocks(engine, hidden, weight, labels, loss, dtype.itemsize)
    assert products == pytest.approx(1 + 2 * (0 + 1 / 2 + 1) / 3)
    for got, want in zip(actual, exact(hidden, weight, labels, loss)):
        assert_near(got, want, dtype)
    assert not actual[1][weights == 0].any()


@engines
@dtypes
def test_one_block_that_has_to_recompute_does_not_change_the_others(engine, dtype):
    hidden, weight, labels = labelled(dtype)
    hidden[:, 0], weight[:, 0] = 0.0, 0.0
    hidden[15, 0], weight[-1, 0], labels[15] = 1.0, 90.0, COLUMNS - 1
    loss = SquaredError(dtype)
    # All columns of a block's rows would fit into one tile, with no later slice to be above the first.
    configure(tile_bytes=TILE // 3)
    *actual, products = in_blocks(lambda: engine(TILE // 3), hidden, weight, labels, loss, dtype.itemsize)
    assert products == pytest.approx(3 + 1 / 3)
    for got, want in zip(actual, exact(hidden, weight, labels, loss)):
        assert_near(got, want, dtype)


@engines
def test_blocks_without_memory_for_what_they_keep_recompute(engine, monkeypatch):
    def none_left(self, columns):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Kept, "room_for", none_left)
    hidden, weight, labels = labelled()
    loss = SquaredError(torch.float32)
    *actual, products = in_blocks(engine, hidden, weight, labels, loss, 4)
    assert products == pytest.approx(4) and memory.keep_budget(hidden.device) == 0
    for got, want in zip(actual, exact(hidden, weight, labels, loss)):
        assert_near(got, want, torch.float32)


@engines
def test_a_nan_in_the_loss_reaches_both_gradients(engine):
    hidden, weight, labels = labelled()
    weights = torch.ones(ROWS).index_fill(0, torch.tensor([20]), torch.nan)
    _, dx, dw, _ = in_blocks(engine, hidden, weight, labels, SquaredError(torch.float32, weights), 4)
    assert dx[20].isnan().all() and dw.isnan().any() and not dx[:20].isnan().any()

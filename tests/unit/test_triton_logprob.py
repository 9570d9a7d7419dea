"""The Triton kernels of the log-prob op in Triton's interpreter, against log_softmax written out in float64.

Tiles are far smaller than in production, so that every loop, mask and merge runs more than once on small shapes.
"""

import itertools

import pytest
import torch
from helpers.logprob import gradients, inputs, reference

pytest.importorskip("triton", reason="the package triton is not installed")

from megatron_laser.ops import (
    IGNORE_LABEL,
    available_backends,
    configure,
    few_row_logprob,
    gpu_backend,
    linear_logprob,
)
from megatron_laser.ops.autograd import Problem, Upstream
from megatron_laser.ops.collectives import GatheredRows
from megatron_laser.ops.device import interpreted
from megatron_laser.ops.kept import MARGIN
from megatron_laser.ops.statistics import Statistics, finish, no_columns
from megatron_laser.ops.tiled_engine import Keep, TilePlan
from megatron_laser.ops.tiles import Shard
from megatron_laser.ops.triton.engine import ChunkedEngine
from megatron_laser.ops.triton.few_rows import FewRowEngine, FewRowTile
from megatron_laser.ops.triton.fused import FusedEngine, FusedTile, best_splits
from megatron_laser.ops.triton.tile_kernels import TritonTiles

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="these tests want Triton's interpreter: TRITON_INTERPRET=1"
)

FUSED = FusedEngine(
    FusedTile(rows=16, columns=32, depth=16, warps=4, stages=2, group=2), splits=3, block=64, min_columns=8
)
FEW_ROWS = FewRowEngine(FewRowTile(16, 32, 16, warps=4, stages=2, per_multiprocessor=1), programs=3)
ENGINES = {"chunked": ChunkedEngine(block=32, min_columns=8), "fused": FUSED}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@pytest.fixture(autouse=True)
def small_tiles():
    """Tiles of 48 columns of 37 rows; the settings of before come back afterwards."""
    before = configure(tile_bytes=4 * 37 * 48, keep_logits_bytes=0)
    yield
    configure(tile_bytes=before.tile_bytes, keep_logits_bytes=before.keep_logits_bytes)


def assert_matches_float64(
    engine, hidden, weight, labels, *, atol=1e-5, gradient_atol=1e-4, entropies=(False, True), **settings
):
    """Both outputs and both gradients, with and without the entropy."""
    for with_entropy in entropies:
        expected = gradients(
            lambda x, w, n=1 + with_entropy: reference(x, w, labels, **settings)[:n],
            hidden.double(),
            weight.double(),
        )
        actual = gradients(
            lambda x, w, on=with_entropy: gpu_backend.linear_logprob(
                x, w, labels, with_entropy=on, engine=engine, **settings
            ),
            hidden,
            weight,
        )
        for name, got, want in zip(("logprobs", "entropy"), actual[0], expected[0]):
            torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-6, msg=name)
        for name, got, want in zip(("dX", "dW"), actual[1:], expected[1:]):
            rtol = 2**-8 if got.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.double(), want, atol=gradient_atol, rtol=rtol, msg=name)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_match_float64(engine, dtype):
    assert_matches_float64(engine, *inputs(hidden_size=48, columns=131, dtype=dtype))


@engines
def test_a_thousand_columns_and_a_hidden_size_of_128(engine):
    configure(tile_bytes=4 * 64 * 400)
    hidden, weight, labels = inputs(64, 128, 1003, torch.bfloat16, scale=0.3)
    if engine is not FUSED:
        engine = ChunkedEngine(block=256, min_columns=64)
    else:
        engine = FusedEngine(
            FusedTile(32, 128, 64, warps=4, stages=2, group=2), splits=2, block=256, min_columns=64
        )
    assert_matches_float64(engine, hidden, weight, labels, vocab_size=1001, entropies=(True,), atol=2e-5)


@engines
@pytest.mark.parametrize("columns", [1, 5, 123])
def test_any_vocabulary_size_works(engine, columns):
    assert_matches_float64(engine, *inputs(rows=7, columns=columns))


@engines
def test_temperature_of_all_rows_and_of_each_row(engine):
    hidden, weight, labels = inputs(rows=19)
    assert_matches_float64(engine, hidden, weight, labels, inv_temperature=0.6)
    per_row = torch.linspace(0.25, 2.0, 19)
    assert_matches_float64(engine, hidden, weight, labels, inv_temperature=per_row)


@engines
def test_strided_inputs_are_read_as_they_are(engine):
    hidden, weight, labels = inputs(rows=18, hidden_size=16, columns=60)
    wide = torch.stack([hidden, hidden + 1], dim=2).flatten(1)[:, ::2]
    both = torch.stack([labels, labels - 1], dim=1)[:, 0]
    temperature = torch.tensor([0.8]).expand(18)
    assert not wide.is_contiguous() and not both.is_contiguous() and temperature.stride() == (0,)
    assert_matches_float64(engine, wide, weight, both, inv_temperature=temperature, entropies=(True,))
    rows = torch.stack([hidden[:16], hidden[:16]], dim=1).flatten(0, 1)[::2]
    few = gpu_backend.few_row_logprob(rows, weight, both[:16], engine=FEW_ROWS)
    expected = reference(hidden[:16], weight, labels[:16])[0]
    torch.testing.assert_close(few.double(), expected, atol=1e-5, rtol=1e-6)


@engines
def test_padded_columns_have_no_probability_and_no_gradient(engine):
    hidden, weight, labels = inputs(columns=64)
    weight[50:] *= 100  # would win the softmax if it were not masked
    labels = labels.clamp(max=49)
    assert_matches_float64(engine, hidden, weight, labels, vocab_size=50)
    _, _, grad = gradients(
        lambda x, w: gpu_backend.linear_logprob(x, w, labels, vocab_size=50, engine=engine), hidden, weight
    )
    assert not grad[50:].any() and grad[:50].any()


@engines
def test_labels_far_below_the_maximum_keep_full_precision(engine):
    hidden, weight, labels = inputs(rows=33, columns=97)
    weight[:, 0] = 0.0
    weight[3, 0] = -1.0  # column 3 is the score token: 20 to 30 nats under the others
    hidden[:, 0] = torch.linspace(18.0, 26.0, 33)
    labels[:] = 3
    below = reference(hidden, weight, labels)[0]
    assert below.max() < -15 and below.min() < -27
    assert_matches_float64(engine, hidden, weight, labels)


@engines
def test_logits_shifted_by_minus_200(engine):
    hidden, weight, labels = inputs(rows=21, columns=77)
    # Coarse values make hidden @ weight exact in float32, so what is measured is the softmax.
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    hidden = torch.cat([hidden, torch.full((21, 8), -25.0)], dim=1)
    weight = torch.cat([weight, torch.ones(77, 8)], dim=1)
    expected, entropy = reference(hidden, weight, labels)
    actual = gpu_backend.linear_logprob(hidden, weight, labels, with_entropy=True, engine=engine)
    torch.testing.assert_close(actual.logprobs.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(actual.entropy.double(), entropy, atol=2e-6, rtol=1e-6)


@engines
def test_one_row_no_rows_and_no_labels(engine):
    hidden, weight, _ = inputs(rows=1)
    assert_matches_float64(engine, hidden, weight, torch.tensor([7]))

    def op(x, w):
        return gpu_backend.linear_logprob(x, w, labels, with_entropy=True, engine=engine)

    hidden, weight, labels = inputs(rows=0)
    outputs, dx, dw = gradients(op, hidden, weight)
    assert [tuple(out.shape) for out in outputs] == [(0,), (0,)]
    assert dx.shape == hidden.shape and not dw.any()
    hidden, weight, labels = inputs(rows=9)
    labels[:] = IGNORE_LABEL
    outputs, dx, dw = gradients(op, hidden, weight)
    assert not any(tensor.any() for tensor in (*outputs, dx, dw))


@engines
def test_two_vocabulary_shards_merge_to_the_whole(engine):
    hidden, weight, labels = inputs(rows=18, columns=80)
    labels.clamp_(max=69)
    shards = []
    for first in (0, 40):
        shard = Shard(first, min(40, 70 - first), 70)
        rows = GatheredRows(hidden, None)
        problem = Problem(rows, weight[first : first + 40], labels, 0.8, shard, True)
        shards.append(engine.statistics(problem, for_backward=False)[0])
    maximum = torch.maximum(shards[0].maximum, shards[1].maximum)
    sums = [one + other for one, other in zip(*(shard.moved_to(maximum) for shard in shards))]
    logprobs, entropy, _ = finish(Statistics(maximum, *sums), labels, Shard(0, 70, 70))
    expected = reference(hidden, weight, labels, 0.8, 70)
    torch.testing.assert_close(logprobs.double(), expected[0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], atol=1e-5, rtol=1e-6)


def test_gradcheck_in_float64():
    hidden, weight, labels = inputs(rows=3, hidden_size=2, columns=6, dtype=torch.float64)
    labels.clamp_(max=4)
    per_row = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)

    configure(tile_bytes=8 * 3 * 3)

    def function(x, w):
        return tuple(
            gpu_backend.linear_logprob(
                x,
                w,
                labels,
                inv_temperature=per_row,
                vocab_size=5,
                with_entropy=True,
                engine=ChunkedEngine(block=4, min_columns=1),
            )
        )

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(
    "keep",
    [2 * 37 * 128, pytest.param(2**30, marks=pytest.mark.long)],  # with some kept, the rest is recomputed
    ids=["some", "all"],
)
def test_kept_probabilities_cost_at_most_their_rounding(keep):
    hidden, weight, labels = inputs(columns=300, dtype=torch.bfloat16)
    engine = ChunkedEngine(block=64, min_columns=8)
    configure(tile_bytes=4 * 37 * 128)

    def op(x, w):
        return gpu_backend.linear_logprob(x, w, labels, with_entropy=True, engine=engine)

    recomputed = gradients(op, hidden, weight)
    configure(tile_bytes=4 * 37 * 128, keep_logits_bytes=keep)
    kept = gradients(op, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(recomputed[0], kept[0]))
    for exact, rounded in zip(recomputed[1:], kept[1:]):
        assert not torch.equal(exact, rounded), "nothing was kept"
        # bfloat16 rounds to 2^-9 of a value; the entropy's logarithm of it adds as much again.
        assert (exact - rounded).abs().max() < 2 * 2**-8 * exact.abs().max()


def test_rows_are_cut_too_when_a_tile_of_all_of_them_is_too_large():
    configure(tile_bytes=4 * 7 * 53)
    plan = ChunkedEngine(block=16).plan(inputs()[0], 37, 53)
    assert not plan.whole_rows
    assert_matches_float64(ChunkedEngine(block=16), *inputs())


# A million rows in pieces of a few values would be a million pieces: seconds, and no other case than 16384 of them.
ROWS_IN_TILES = [(rows, size) for rows in (1, 37, 16384) for size in (4, 400)]
ROWS_IN_TILES += [(rows, size * 2**20) for rows in (1, 37, 16384, 10**6) for size in (64, 528)]


@pytest.mark.parametrize(("rows", "tile_bytes"), ROWS_IN_TILES)
@pytest.mark.parametrize("columns", [1, 53, 19008, 152064])
def test_a_plan_covers_everything_once_within_its_budget(rows, columns, tile_bytes):
    plan = TilePlan.of(
        rows, columns, 64, itemsize=4, tile_bytes=tile_bytes, min_columns=2048, multiprocessors=132
    )
    assert plan.row_block * max(plan.widths) * 4 <= tile_bytes
    for length, parts in ((rows, list(plan.row_slices())), (columns, list(plan.column_slices()))):
        assert parts[0].start == 0 and parts[-1].stop == length
        assert all(one.stop == other.start for one, other in itertools.pairwise(parts))


def spread_out(values, stride):
    """`values` [rows, columns] with so large a row stride; memory that nobody touches is not there."""
    rows, columns = values.shape
    try:
        buffer = torch.empty((rows - 1) * stride + columns, dtype=values.dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine gives no address space: {error}")
    return buffer.as_strided((rows, columns), (stride, 1)).copy_(values)


def test_a_tile_may_reach_beyond_two_billion_values(monkeypatch):
    # The interpreter copies every argument onto itself afterwards, which would touch all of it.
    copy = torch.UntypedStorage.copy_
    monkeypatch.setattr(
        torch.UntypedStorage,
        "copy_",
        lambda self, other, *rest: self if self.data_ptr() == other.data_ptr() else copy(self, other, *rest),
    )
    rows, columns, stride = 3, 20, 2**30  # the third row begins at 2^31
    z = torch.randn(rows, columns)
    labels, ones = torch.tensor([3, 19, 7]), torch.ones(rows)
    lse, grads = z.logsumexp(1), torch.tensor([1.0, -2.0, 3.0])
    state = no_columns(rows, torch.float32, z.device, False)
    kept = spread_out(torch.zeros(rows, columns, dtype=torch.bfloat16), stride)
    base = torch.zeros(rows)
    tile = spread_out(z, stride)
    functions = TritonTiles(16)
    functions.statistics(tile, labels, ones, state, 0, Keep(kept, base, True))
    torch.testing.assert_close(state.maximum + state.total.log(), lse)
    torch.testing.assert_close(state.label_logit, z.gather(1, labels[:, None]).squeeze(1))
    torch.testing.assert_close(base, z.amax(1) + MARGIN)
    upstream = Upstream(z.new_zeros(rows), lse, None, grads, None)
    p = z.softmax(1)
    expected = grads[:, None] * (torch.eye(columns)[labels] - p)
    scale = (base - lse).exp()[:, None]
    # the interpreter cuts bfloat16 off where the device rounds
    torch.testing.assert_close(kept.float() * scale, p, rtol=2**-7, atol=1e-6)
    functions.gradient(kept, labels, ones, upstream, tile, 0, base)
    torch.testing.assert_close(tile.clone(), expected, rtol=2**-7, atol=1e-6)
    tile.copy_(z)
    functions.gradient(tile, labels, ones, upstream, tile, 0, None)
    torch.testing.assert_close(tile.clone(), expected)


@engines
def test_two_calls_are_bitwise_equal(engine):
    hidden, weight, labels = inputs(rows=20, columns=90)
    first, second = (
        gradients(
            lambda x, w: gpu_backend.linear_logprob(x, w, labels, with_entropy=True, engine=engine),
            hidden,
            weight,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip([*first[0], *first[1:]], [*second[0], *second[1:]]))


def test_the_public_calls_take_the_backend_by_name_only():
    hidden, weight, labels = inputs(rows=9)
    assert "triton" in available_backends(hidden.device)
    by_name = linear_logprob(hidden, weight, labels, backend="triton").logprobs
    automatic = linear_logprob(hidden, weight, labels)
    assert torch.equal(automatic.logprobs, linear_logprob(hidden, weight, labels, backend="torch").logprobs)
    torch.testing.assert_close(by_name, automatic.logprobs, atol=1e-5, rtol=1e-6)
    few = few_row_logprob(hidden, weight, labels, backend="triton")
    torch.testing.assert_close(few, automatic.logprobs, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("tiles", [75, 594])
@pytest.mark.parametrize("row_blocks", [1, 4, 37, 128])
def test_splits_fill_the_device(row_blocks, tiles):
    splits = best_splits(row_blocks, tiles, 132, 16)
    assert 1 <= splits <= tiles
    per_split = -(-tiles // splits)
    steps = -(-row_blocks * -(-tiles // per_split) // 132) * per_split
    assert steps <= 1.25 * row_blocks * tiles / 132 + 1

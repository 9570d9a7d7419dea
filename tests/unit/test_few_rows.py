"""The few-row op: which rows, partial results merged and finished in one kernel, launches per call."""

import math

import pytest
import torch
from helpers.logprob import inputs, reference
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laser.ops import IGNORE_LABEL, few_row_logprob, torch_backend
from megatron_laser.ops.few_rows import NOTHING, FewRows, StatisticsOf, own_rows
from megatron_laser.ops.statistics import Statistics, merged
from megatron_laser.ops.statistics import finish as finish_in_torch
from megatron_laser.ops.tiles import Shard

pytest.importorskip("triton", reason="the package triton is not installed")

from triton.runtime import interpreter

from megatron_laser.ops import gpu_backend
from megatron_laser.ops.device import interpreted
from megatron_laser.ops.triton.engine import ChunkedEngine
from megatron_laser.ops.triton.few_rows import FewRowEngine, FewRowTile
from megatron_laser.ops.triton.fused import FusedEngine, FusedTile
from megatron_laser.ops.triton.merge import block_of, finish, merge, pick

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="these tests want Triton's interpreter: TRITON_INTERPRET=1"
)

FEW_ROWS = FewRowEngine(FewRowTile(16, 32, 16, warps=4, stages=2, per_multiprocessor=1), programs=3)
FUSED = FusedEngine(FusedTile(rows=16, columns=32, depth=16, warps=4, stages=2, group=2), splits=3)
ENGINES = {"few_rows": FEW_ROWS, "fused": FUSED, "chunked": StatisticsOf(ChunkedEngine(block=32))}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def assert_matches_float64(engine, hidden, weight, labels, atol=1e-5, **settings):
    actual = gpu_backend.few_row_logprob(hidden, weight, labels, engine=engine, **settings)
    expected = reference(hidden, weight, labels, **settings)[0]
    assert actual.dtype == torch.float32 and not actual.requires_grad
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=1e-6)
    return actual


@engines
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (16, 33), (40, 131)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_match_float64(engine, rows, columns, dtype):
    assert_matches_float64(engine, *inputs(rows, 48, columns, dtype))


@engines
def test_padding_is_masked_and_logits_may_be_shifted(engine):
    hidden, weight, labels = inputs(12, 16, 90)
    weight[70:] *= 100
    labels.clamp_(max=69)
    hidden = torch.cat([hidden, torch.full((12, 8), -25.0)], dim=1)
    weight = torch.cat([weight, torch.ones(90, 8)], dim=1)
    # logits of 200 have ulp 1.5e-5
    assert_matches_float64(engine, hidden, weight, labels, atol=6e-5, vocab_size=70)


@engines
def test_labels_30_nats_below_the_others_are_exact(engine):
    hidden, weight, labels = inputs(rows=21, columns=97)
    weight[:, 0], weight[3, 0] = 0.0, -1.0
    hidden[:, 0] = torch.linspace(20.0, 27.0, 21)
    labels[:] = 3
    assert reference(hidden, weight, labels)[0].min() < -29
    assert_matches_float64(engine, hidden, weight, labels)


@engines
def test_a_label_outside_the_vocabulary_is_nan_and_none_is_0(engine):
    hidden, weight, labels = inputs(rows=6, columns=40)
    labels[:] = torch.tensor([IGNORE_LABEL, 33, 34, -1, 40, 2])
    actual = gpu_backend.few_row_logprob(hidden, weight, labels, vocab_size=34, engine=engine)
    assert actual.isnan().tolist() == [False, False, True, True, True, False]
    assert actual[0] == 0 and actual[1] < 0


def test_few_rows_leave_labels_of_another_shard_alone():
    hidden, weight, _ = inputs(rows=8, columns=80)
    labels = torch.arange(36, 44)  # both sides of the cut, within one tile of it
    logits = hidden.double() @ weight.double().T
    for engine in ENGINES.values():
        for first in (0, 40):
            shard = Shard(first, 40, 80)
            partials = engine.partials(FewRows(hidden, weight[first : first + 40], labels, shard))
            own = (labels >= first) & (labels < first + 40)
            expected = logits.gather(1, labels.unsqueeze(1)).squeeze(1) * own
            torch.testing.assert_close(merge(partials)[2].double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("parts", "rows"), [(1, 1), (3, 37), (132, 5), (264, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_and_finishing_equal_torchs(parts, rows, dtype):
    generator = torch.Generator().manual_seed(parts + rows)
    made = torch.rand(4, parts, rows, generator=generator, dtype=dtype) + 0.1
    made[0] = 20 * made[0] - 230
    made[0, parts // 2, rows // 2] = -math.inf  # a part of nothing but padding
    made[1:, parts // 2, rows // 2] = 0
    labels = torch.randint(0, 500, (rows,), generator=generator)
    labels[0] = 700
    labels[-1] = IGNORE_LABEL if rows > 1 else 700
    statistics = merged(made.transpose(0, 1))
    # parts == 1: a row without any column, whose maximum stays -inf.
    tolerance = dict(atol=1e-12 if dtype == torch.float64 else 3e-4, rtol=1e-5, equal_nan=True)
    for got, want in zip(merge(made), statistics):
        torch.testing.assert_close(got, want, **tolerance)
    want = finish_in_torch(statistics, labels, Shard(0, 500, 500))[0]
    assert labels[0] == 700 and want[0].isnan()
    for order in (made[:3], made[:3].transpose(0, 1).contiguous().transpose(0, 1)):
        got = finish(order, labels, 500)
        torch.testing.assert_close(got, want, **tolerance)
    padded, block = block_of(parts)
    assert padded >= parts and padded * block <= 2048


def test_shards_of_nothing_but_padding_change_nothing():
    one = Statistics(torch.tensor([2.0, -3.0]), torch.tensor([4.0, 1.5]), torch.tensor([1.0, 0.0]), None)
    empty = torch.tensor([[-math.inf] * 2, [0.0] * 2, [0.0] * 2])
    real = torch.stack(one[:3])
    for order in ([real, empty], [empty, real], [empty, real, empty]):
        for got, want in zip(merged(torch.stack(order)), one):
            assert want is None or torch.equal(got, want)
    none = merged(torch.stack([empty, empty]))
    assert none.maximum.tolist() == [-math.inf] * 2 and none.total.tolist() == [0.0] * 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_select(backend):
    hidden, weight, labels = inputs(rows=20, columns=60)
    rows = torch.tensor([1, 1, 4, 19])
    actual = few_row_logprob(hidden, weight, labels[rows], rows=rows, backend=backend)
    expected = reference(hidden[rows], weight, labels[rows])[0]
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-6)
    none = torch.empty(0, dtype=torch.int64)
    assert few_row_logprob(hidden, weight, none, rows=none, backend=backend).shape == (0,)
    # one rank: its shard is everything
    alone = few_row_logprob(hidden, weight, labels[rows], rows=rows, sequence_parallel=True, backend=backend)
    assert torch.equal(alone, actual)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([[1]]), r"rows is \(1, 1\) torch.int64"),
        (torch.tensor([1.0]), "torch.float32"),
        (torch.tensor([1], device="meta"), "on meta"),
        (torch.tensor([0, 20]), "positions from 0 to 20: expected 0 to 19"),
        (torch.tensor([-1, 3]), "positions from -1"),
    ],
)
def test_rows_that_are_no_positions_are_refused(rows, message):
    hidden, weight, labels = inputs(rows=20)
    with pytest.raises(ValueError, match=message):
        few_row_logprob(hidden, weight, labels[: rows.shape[0]], rows=rows)


def test_labels_are_one_for_each_of_the_rows():
    hidden, weight, labels = inputs(rows=20)
    with pytest.raises(ValueError, match=r"labels is \(20,\).*expected \[2\]"):
        few_row_logprob(hidden, weight, labels, rows=torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("picked", ["torch", "triton"])
def test_rows_of_all_ranks_add_up_bit_by_bit(dtype, picked):
    hidden = inputs(rows=12, hidden_size=10, dtype=dtype)[0]
    hidden[2, 3], hidden[2, 4], hidden[7, 0], hidden[7, 1] = -0.0, math.nan, math.inf, 0.0
    positions = torch.tensor([0, 2, 2, 5, 6, 7, 11])
    total = None
    for first in (0, 4, 8):
        shard = hidden[first : first + 4]
        if picked == "torch":
            own = own_rows(shard, positions, first)
        else:
            own = pick(shard, positions, first, 12, NOTHING)
        total = own if total is None else total + own
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    want = hidden[positions]
    numbers = ~want.isnan()
    assert torch.equal(total[numbers], want[numbers])
    if picked == "torch":  # the interpreter makes 0 of a scalar -0
        assert torch.equal(total.view(bits)[numbers], want.view(bits)[numbers])
    assert total[~numbers].isnan().all() and (~numbers).sum() == 2
    assert own_rows(hidden[:0], positions[:0], 0).shape == (0, 10)


def test_a_position_that_no_rank_has_gives_nan():
    hidden = inputs(rows=4, hidden_size=10)[0]
    own = pick(hidden, torch.tensor([3, 5, 8, -1]), 4, 8, NOTHING)
    assert own.isnan().all(1).tolist() == [False, False, True, True]
    assert torch.equal(own[1], hidden[1]) and not own[0].any()


class Launches(TorchDispatchMode):
    """Names of torch's operations and Triton's launches, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """What a call runs: the interpreter's own copying is left out."""
    mode = Launches()
    run = interpreter.GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        mode.names.append(executor.fn.__name__)
        with torch._C._DisableTorchDispatch():
            return run(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return mode


def test_a_call_is_two_launches_and_one_allocation_for_each(launches):
    hidden, weight, labels = inputs(rows=9, hidden_size=16, columns=200)
    with launches:
        few_row_logprob(hidden, weight, labels, backend="triton")
    assert launches.names == ["aten::empty", "few_row_statistics", "aten::empty", "finish_partials"]


def test_rows_cost_one_operation_more(launches):
    hidden, weight, labels = inputs(rows=9, hidden_size=16, columns=200)
    rows = torch.tensor([0, 3])
    with launches:
        gpu_backend.few_row_logprob(hidden, weight, labels[rows], rows=rows)
    assert [name for name in launches.names if name != "aten::empty"][1:] == [
        "aten::index_select",
        "few_row_statistics",
        "finish_partials",
    ]


def test_the_backends_agree():
    hidden, weight, labels = inputs(rows=9)
    one = few_row_logprob(hidden, weight, labels, backend="triton")
    other = torch_backend.few_row_logprob(hidden, weight, labels)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6)
    double = few_row_logprob(hidden.double(), weight.double(), labels)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, reference(hidden, weight, labels)[0])

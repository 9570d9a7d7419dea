"""`bench logprob` and `bench score`: checked before timed, floors, table and files."""

import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from megatron_laser.benchmarks import logprob, logprob_ops, logprob_peers
from megatron_laser.benchmarks.logprob_implementation import Implementation, dense
from megatron_laser.benchmarks.logprob_report import Shape
from megatron_laser.cli import app
from megatron_laser.model import platform

pytestmark = pytest.mark.skipif(platform.has_cuda(), reason="asserts what the benchmark does on a CPU")
PAINTED = True  # see helpers/pictures.py
SHAPE = Shape(40, 16, 96, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Every timing is one call; the ceilings are made up."""

    def once(call, **settings):
        call()
        return 0.5

    monkeypatch.setattr(logprob, "seconds_per_call", once)
    ceilings = logprob.Ceilings(
        "a device", "float32", flops=2 * 40 * 16 * 96 / 0.25, bytes=16 * 96 * 4 / 0.125
    )
    monkeypatch.setattr(logprob, "measure_ceilings", lambda dtype: ceilings)


def test_the_table_and_the_files_have_every_contender_and_its_ratio_to_the_floor(tmp_path):
    report = logprob.bench_logprob([SHAPE])
    names = [one.implementation for one in report.measurements]
    assert [name for name in names if "in blocks" not in name] == [
        "megatron_laser",
        *(f"megatron_laser: {variant}" for variant in ("main_grad", "recompute", "kept", "kept, main_grad")),
        *("megatron_laser: kept, half the rows", "torch, tiled", "torch, dense"),
    ]
    assert not report.wrong and all(one.both == 0.5 and one.host > 0 for one in report.measurements)
    first = report.measurements[0]
    assert (first.forward, first.forward_floor, first.backward_floor) == (0.5, 0.25, 0.75)
    assert first.error < 1e-5 and first.peak_bytes > 0 and first.forward_peak_bytes > 0
    table = report.table()
    assert "No CUDA device" in table and "40 x 16 x 96 (tp 2)" in table and "2.00" in table
    data, figure = report.write(tmp_path, "logprob")
    assert json.loads(data.read_text())["measurements"][0]["forward"] == 0.5
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_score_benchmarks_floor_is_one_read_of_the_weight(tmp_path):
    report = logprob.bench_score([Shape(4, 16, 96, 1), Shape(400, 16, 96, 1)])
    few, many = report.measurements[0], report.measurements[-1]
    assert few.forward_floor == pytest.approx(0.125) and few.backward is None
    assert many.forward_floor == pytest.approx(2.5)  # the products take longer than the read
    assert len(report.write(tmp_path, "score")) == 2


def wrong(hidden, weight, labels):
    return dense(hidden, weight, labels) + (labels >= 0) * 0.5


def wrong_gradient(hidden, weight, labels):
    return dense(hidden, 2 * weight - weight.detach(), labels)


@pytest.mark.parametrize(("op", "message"), [(wrong, "off by 0.5 nats"), (wrong_gradient, "dW is off by 1")])
def test_a_wrong_result_of_ours_fails_the_command_and_loses_no_other_measurement(monkeypatch, op, message):
    contenders = [Implementation("bad", op, ours=True), Implementation("good", dense)]
    monkeypatch.setattr(logprob, "training_ops", lambda device: contenders)
    told = []
    report = logprob.bench_logprob([SHAPE], listener=told.append)
    bad, good = report.measurements
    assert report.wrong == [bad] and message in bad.note and bad.forward is None
    assert good.forward == 0.5 and told == [bad, good]
    monkeypatch.setattr(logprob, "bench_logprob", lambda **settings: report)
    done = CliRunner().invoke(app, ["bench", "logprob"])
    assert done.exit_code == 1 and message in done.output and "good" in done.output


def test_forward_and_backward_are_added_up_and_set_against_three_products(monkeypatch):
    times = iter([0.5, 2.0])  # the forward, then both together
    monkeypatch.setattr(logprob, "seconds_per_call", lambda call: next(times))
    monkeypatch.setattr(logprob, "training_ops", lambda device: [Implementation("one", dense)])
    report = logprob.bench_logprob([SHAPE])
    assert report.measurements[0].both == 2.0
    assert "sum ms" in report.table() and " 2000.000 " in report.table()
    assert f"{2.0 / 0.75:.2f}" in report.table()


def test_main_grad_is_checked_where_it_is_written(monkeypatch):
    def forgets(hidden, weight, labels):
        weight.main_grad.sub_(1.0)
        return dense(hidden, weight, labels)

    monkeypatch.setattr(
        logprob, "training_ops", lambda device: [Implementation("bad", forgets, ours=True, main_grad=True)]
    )
    assert "dW is off" in logprob.bench_logprob([SHAPE]).wrong[0].note


def test_a_peer_that_is_wrong_or_fails_gets_a_note_instead_of_a_time(monkeypatch):
    def fails(hidden, weight, labels):
        raise RuntimeError("no kernel image")

    contenders = [
        *(Implementation("wrong", wrong), Implementation("fails", fails)),
        Implementation(
            "summed", lambda *inputs: dense(*inputs).sum(), only_sum=True, remark=lambda *inputs: "all"
        ),
    ]
    monkeypatch.setattr(logprob, "training_ops", lambda device: contenders)
    one, other, summed = logprob.bench_logprob([SHAPE]).measurements
    assert one.forward is None and "off by 0.5 nats" in one.note
    assert other.forward is None and "no kernel image" in other.note
    assert summed.forward == 0.5 and summed.error < 1e-5 and summed.note == "all"


@pytest.mark.parametrize("name", ["logprob", "score"])
def test_the_command_prints_the_table_and_writes_both_files(name, monkeypatch, tmp_path):
    original = getattr(logprob, f"bench_{name}")
    monkeypatch.setattr(logprob, f"bench_{name}", lambda **settings: original([SHAPE], **settings))
    done = CliRunner().invoke(app, ["bench", name, "--output", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert "torch, dense" in done.output
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        *(f"{name}.json", f"{name}.jsonl", f"{name}.png")
    ]
    first, *lines = map(json.loads, (tmp_path / "new" / f"{name}.jsonl").read_text().splitlines())
    measurements = json.loads((tmp_path / "new" / f"{name}.json").read_text())["measurements"]
    assert first["provenance"]["versions"]["torch"] == torch.__version__ and lines == measurements


def test_ceilings_are_measured_on_this_device():
    from megatron_laser.benchmarks.measure import measure_ceilings

    ceilings = measure_ceilings(torch.float32)
    assert 1e8 < ceilings.flops < 1e15 and 1e7 < ceilings.bytes < 1e13


def test_dense_is_a_contender_for_scores_too():
    assert [one.name for one in logprob_ops.score_ops(torch.device("cpu"))][-1] == "torch, dense"


def test_what_was_measured_before_a_crash_is_on_disk(monkeypatch, tmp_path):
    def dies(hidden, weight, labels):
        raise KeyboardInterrupt

    contenders = [Implementation("good", dense), Implementation("dies", dies)]
    monkeypatch.setattr(logprob, "training_ops", lambda device: contenders)
    original = logprob.bench_logprob
    monkeypatch.setattr(logprob, "bench_logprob", lambda **settings: original([SHAPE], **settings))
    assert CliRunner().invoke(app, ["bench", "logprob", "--output", str(tmp_path)]).exit_code != 0
    lines = [json.loads(line) for line in (tmp_path / "logprob.jsonl").read_text().splitlines()]
    assert "provenance" in lines[0] and [line["implementation"] for line in lines[1:]] == ["good"]


def test_rows_without_gradient_are_checked_as_such(monkeypatch):
    """One that gives every row a gradient, where the loss is a sum over half of them, is wrong."""

    class Everywhere(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logprobs):
            return logprobs.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.ones_like(grad)

    contenders = [
        Implementation("right", dense, ours=True, half=True),
        Implementation("wrong", lambda *inputs: Everywhere.apply(dense(*inputs)), ours=True, half=True),
    ]
    monkeypatch.setattr(logprob, "training_ops", lambda device: contenders)
    report = logprob.bench_logprob([SHAPE])
    assert [one.implementation for one in report.wrong] == ["wrong"] and "dX is off" in report.wrong[0].note


def module(monkeypatch, name, **contents):
    """A module that only this test has, and the packages around it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], sys.modules[path])
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


@pytest.fixture
def peers(monkeypatch):
    """Stand-ins with the signatures of liger-kernel 0.8.5, quack-kernels 0.6.5 and cut-cross-entropy 25.1.1."""

    class Loss:
        def __init__(self, reduction):
            assert reduction == "sum" and pins[-1] == "nvidia-triton"

        def __call__(self, lin_weight, _input, target, bias=None):
            return -dense(_input, lin_weight, target).sum()

    class PerToken:
        @staticmethod
        def apply(_input, weight, target, temperature=1.0, ignore_index=-100):
            assert (temperature, ignore_index) == (1.0, -100)
            return -dense(_input, weight, target)

    def sm90(_input, weight, target, ignore_index=-100, reduction="mean"):
        assert (ignore_index, reduction) == (-100, "sum")
        return -dense(_input, weight, target).sum()

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
        assert chunk_size % 128 == 0 and (ignore_index, reduction) == (-100, "sum")
        return -dense(x, weight, target).sum()

    def cut(e, c, targets, *, reduction="mean", filter_eps="auto"):
        assert reduction == "none" and filter_eps is None
        return -dense(e, c, targets)

    pins = [None]
    module(
        monkeypatch,
        "liger_kernel.backends",
        get_impl=lambda: pins[-1],
        set_impl=lambda name: pins.append(name),
    )
    module(monkeypatch, "liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=Loss)
    module(
        monkeypatch,
        "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        LigerFusedLinearScaledCrossEntropyFunction=PerToken,
    )
    module(
        monkeypatch,
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        liger_fused_linear_cross_entropy_sm90=sm90,
    )
    module(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=quack)
    module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=cut)
    monkeypatch.setattr(logprob_peers, "_compiled", lambda: dense)
    return pins


def test_peers_are_called_as_they_want_it_and_agree_with_float64(monkeypatch, peers):
    monkeypatch.setattr(logprob, "training_ops", lambda device: logprob_peers.peers())
    measurements = logprob.bench_logprob([SHAPE]).measurements
    assert {one.implementation: one.note for one in measurements if one.both is None} == {}
    assert len(measurements) == 6 and max(one.error for one in measurements) < 1e-5
    assert peers[-1] is None  # What was pinned before is pinned again.


def test_a_peer_that_is_not_installed_gets_a_note(monkeypatch):
    for name in ("liger_kernel", "quack", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(logprob_peers, "_compiled", lambda: dense)
    monkeypatch.setattr(logprob, "training_ops", lambda device: logprob_peers.peers())
    compiled, *others = logprob.bench_logprob([SHAPE]).measurements
    assert compiled.both == 0.5
    assert all(one.both is None and "ModuleNotFoundError" in one.note for one in others)


def test_chunks_of_rows_equal_all_rows_at_once():
    hidden, weight, labels = logprob.inputs(SHAPE, True)
    parts = logprob_peers.chunks(hidden, weight, labels, dense, rows=7)
    assert torch.allclose(parts, dense(hidden, weight, labels), atol=1e-6)

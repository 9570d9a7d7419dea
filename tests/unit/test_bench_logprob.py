"""`bench logprob` and `bench score`: checked before timed, floors, table and files."""

import json

import pytest
import torch
from typer.testing import CliRunner

from megatron_laser.benchmarks import logprob, logprob_ops
from megatron_laser.benchmarks.logprob_ops import Implementation, dense
from megatron_laser.benchmarks.logprob_report import Shape
from megatron_laser.cli import app
from megatron_laser.model import platform

pytestmark = pytest.mark.skipif(platform.has_cuda(), reason="asserts what the benchmark does on a CPU")
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
    assert [one.implementation for one in report.measurements] == [
        *("megatron_laser", "megatron_laser: main_grad", "torch, tiled", "torch, dense")
    ]
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
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [f"{name}.json", f"{name}.png"]


def test_ceilings_are_measured_on_this_device():
    from megatron_laser.benchmarks.measure import measure_ceilings

    ceilings = measure_ceilings(torch.float32)
    assert 1e8 < ceilings.flops < 1e15 and 1e7 < ceilings.bytes < 1e13


def test_dense_is_a_contender_for_scores_too():
    assert [one.name for one in logprob_ops.score_ops(torch.device("cpu"))][-1] == "torch, dense"

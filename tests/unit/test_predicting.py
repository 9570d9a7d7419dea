"""Which machine a run takes itself to be on, and predictions that cost little and end no run."""

import math
from types import SimpleNamespace

import pytest
import yaml
from helpers.tiny_run import write_tiny_run

from megatron_laser.config import ConfigError, load_config
from megatron_laser.model import platform
from megatron_laser.planner.machine import read_machine
from megatron_laser.run import predicting
from megatron_laser.run.predicting import Predictor, peaks, run_machine
from megatron_laser.run.speed import Speed
from megatron_laser.trainer.forward_backward import OptimizerStep
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

CPU = {"base": "h100", "device": "cpu", "memory_gib": 4.0, "matmul_flops": {"float32": 1.0e9}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "cpu.yaml").write_text(yaml.safe_dump(CPU))
    return write_tiny_run(folder)


def config(file, *overrides):
    return load_config(file, overrides)


@pytest.fixture
def on_cpu(file):
    return config(file, f"logging.machine={file.parent / 'cpu.yaml'}")


@pytest.mark.parametrize(
    ("device", "dtype", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", "h100"),
        ("NVIDIA H200", "float32", "h200"),
        ("NVIDIA B200", "bfloat16", "b200"),
        ("NVIDIA H100 PCIe", "bfloat16", None),  # the same chip with another peak
        ("NVIDIA H200 NVL", "bfloat16", None),
        ("CPU (gloo)", "float32", None),
    ],
)
def test_a_gpu_is_known_by_its_exact_name_and_nothing_else_is(file, monkeypatch, device, dtype, found):
    monkeypatch.setattr(platform, "device_name", lambda: device)
    machine = run_machine(config(file, f"model.dtype={dtype}"))
    assert (None if machine is None else machine.name) == found


def test_a_machine_of_another_device_is_left_out_and_said(file, caplog):
    assert run_machine(config(file, "logging.machine=h100")) is None
    assert "logging.machine h100 is of device cuda, and this run computes on cpu" in caplog.text


def test_servers_with_quantized_weights_have_the_peak_of_fp8_where_it_is_known(file, on_cpu):
    h100 = read_machine("h100")
    server = ["rollout.engine=sglang", "rollout.sglang.urls=[http://127.0.0.1:1]"]
    plain = config(file, *server, "model.dtype=bfloat16")
    quantized = config(file, *server, "model.dtype=bfloat16", "rollout.sglang.quantization=fp8")
    assert peaks(plain, h100) == (989e12, 989e12)
    assert peaks(quantized, h100) == (989e12, 1979e12)
    assert peaks(on_cpu, run_machine(on_cpu)) == (1e9, 1e9)
    assert peaks(plain, None) is None


def batch(step):
    samples = [Sample([7] * 4, Generation([9] * n, [0.0] * n, "stop", 0), "", True, 1.0) for n in (3, 8)]
    return RolloutBatch(step, step - 1, [Group(Prompt(0, "", "", [7] * 4), samples)] * 2)


class Clock:
    """Each prediction takes `cost` seconds."""

    def __init__(self, cost):
        self.now, self.cost = 0.0, cost

    def __call__(self):
        self.now += self.cost
        return self.now


def test_predictions_take_a_hundredth_of_the_steps_and_the_first_is_made(on_cpu):
    predictor = Predictor(on_cpu, run_machine(on_cpu), 1, clock=Clock(0.25))
    times = {"time/total": 10.0, "time/train": 2.0}
    said = [bool(predictor.metrics(batch(n), times, server_gpus=0, whole=True)) for n in range(1, 11)]
    # A quarter of a second each: the second one when 25 s have passed, the third at 50 s.
    assert [number for number, each in enumerate(said, start=1) if each] == [1, 3, 5, 8, 10]


def test_a_step_is_predicted_with_its_own_lengths_and_imbalance(on_cpu):
    predictor = Predictor(on_cpu, run_machine(on_cpu), 2, clock=Clock(0.0))
    times = {"time/total": 10.0, "time/train": 2.0}
    found = predictor.metrics(batch(1), times, server_gpus=0, whole=True)
    assert found["plan/train_ratio"] == pytest.approx(2.0 / found["plan/train_seconds"])
    longer = RolloutBatch(2, 1, [Group(Prompt(0, "", "", [7] * 8), batch(1).groups[0].samples)])
    for sample in longer.samples():
        sample.prompt_ids = [7] * 8
    more = predictor.metrics(longer, times, server_gpus=0, whole=True)
    uneven = predictor.metrics(longer, times | {"rank_imbalance": 0.9}, server_gpus=0, whole=True)
    assert found["plan/train_seconds"] < more["plan/train_seconds"] < uneven["plan/train_seconds"]


def test_a_prediction_that_fails_is_said_once_and_ends_nothing(on_cpu, monkeypatch, caplog):
    def broken(*arguments):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(predicting, "predict_step", broken)
    predictor = Predictor(on_cpu, run_machine(on_cpu), 1)
    for step in (1, 2, 3):
        assert predictor.metrics(batch(step), {"time/total": 100.0}, server_gpus=0, whole=True) == {}
    assert caplog.text.count("predicting a step's seconds (logging.machine) failed") == 1


def test_what_is_far_off_is_said_in_the_log(on_cpu, caplog):
    predictor = Predictor(on_cpu, run_machine(on_cpu), 1, clock=Clock(0.0))
    for step in range(1, 8):
        predictor.metrics(
            batch(step), {"time/total": 50.0, "time/train": 49.0}, server_gpus=0, whole=step != 7
        )
    (line,) = [record.message for record in caplog.records if "were predicted" in record.message]
    assert line.startswith("step 6: train takes 49 s where 0.") and "cpu.yaml" in line


def result(*bad):
    updates = tuple(OptimizerStep(0, index, 1.0, names, []) for index, names in enumerate(bad))
    return SimpleNamespace(updates=updates)


def test_an_update_that_was_given_up_before_it_was_computed_has_no_mfu(on_cpu):
    speed = Speed(on_cpu, object())
    times = {"time/total": 4.0, "time/generate": 1.0, "time/logprob": 1.0, "time/train": 1.0}
    done = speed.metrics(batch(1), result(()), times)
    skipped = speed.metrics(batch(2), result(("total_loss",)), times)  # computed, and not applied
    given_up = speed.metrics(batch(3), result(("score",)), times)
    assert done["mfu/train"] == skipped["mfu/train"] > 0
    assert "mfu/train" not in given_up and given_up["mfu/logprob"] == done["mfu/logprob"]


def test_the_trainer_waits_while_it_is_told_to(on_cpu, monkeypatch):
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("megatron_laser.run.speed.time", SimpleNamespace(monotonic=lambda: next(now)))
    speed = Speed(on_cpu, object())
    with speed.waiting():
        pass
    with pytest.raises(KeyError), speed.waiting():
        raise KeyError
    times = {"time/total": 8.0, "time/generate": 2.0}
    assert speed.metrics(batch(1), result(()), times)["idle/trainer"] == 0.5
    assert math.isclose(speed.metrics(batch(2), result(()), times)["idle/trainer"], 0.0)


def test_a_machine_that_is_none_names_what_there_is(file):
    with pytest.raises(ConfigError, match="known are h100, h200, b200"):
        run_machine(config(file, "logging.machine=h1000"))

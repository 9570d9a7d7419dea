"""A machine is measured with the run's own model and batches, and its file is one that the planner reads."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_run import write_tiny_run

from megatron_laser.model import platform

platform.install()

from megatron_laser.benchmarks import calibration, calibration_timing  # noqa: E402
from megatron_laser.config import load_config, resolve_plan  # noqa: E402
from megatron_laser.planner.assumptions import read_assumptions  # noqa: E402
from megatron_laser.planner.machine import Machine, read_machine  # noqa: E402
from megatron_laser.planner.phase_times import predict_step  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "measure_planner.py"


def test_two_points_on_a_line_give_its_slope_and_what_a_micro_batch_takes_besides() -> None:
    assert calibration_timing.line((100.0, 1, 12.0), (40.0, 1, 6.0)) == (
        pytest.approx(0.1),
        pytest.approx(2.0),
    )
    assert calibration_timing.line((100.0, 3, 16.0), (40.0, 1, 6.0)) == (
        pytest.approx(0.1),
        pytest.approx(2.0),
    )


def test_a_line_that_noise_has_turned_around_is_all_slope() -> None:
    assert calibration_timing.line((100.0, 1, 5.0), (40.0, 1, 6.0)) == (pytest.approx(0.05), 0.0)
    assert calibration_timing.line((100.0, 1, 20.0), (40.0, 1, 2.0)) == (pytest.approx(0.2), 0.0)


@pytest.mark.parametrize(
    ("slope", "expected"),
    [(0.2, (0.2, 30.0)), (0.5, (0.5, 0.0)), (3.0, (0.5, 0.0))],
    ids=["some is left", "all of it", "more than there is"],
)
def test_a_backward_takes_no_more_than_an_update_without_all_else(
    slope: float, expected: tuple[float, float]
) -> None:
    # An update of 100 FLOPs takes 60 s without its forward, and 10 of these are the optimizer's.
    assert calibration_timing.backward_and_rest(slope, 60.0, 100.0, 10.0) == pytest.approx(expected)


def test_calls_are_timed_as_many_as_a_sample_has(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    # The first is warming up; then one in three takes longer, as a call does that is interrupted.
    takes = iter([9.0, *([0.01, 0.01, 0.04] * 200)])

    def call() -> None:
        clock[0] += next(takes)

    monkeypatch.setattr(calibration_timing.time, "perf_counter", lambda: clock[0])
    assert calibration_timing.quick_seconds(call) == pytest.approx(0.02, rel=0.15)


def test_a_calibrated_machine_is_one_that_the_planner_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(calibration_timing, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(calibration, "_DISK_BYTES", 2**16)
    config = load_config(write_tiny_run(tmp_path))
    measured = calibration.calibrate(config)
    assert measured is not None
    file = tmp_path / "here.yaml"
    file.write_text(calibration.machine_text(measured))
    machine = read_machine(file)
    assert (machine.device, machine.gpus_per_node) == (platform.device().type, 1)
    assert set(measured["sources"]) == set(measured) - {"device", "sources", "base"}
    assert isinstance(machine, Machine)
    step = predict_step(resolve_plan(config), machine, read_assumptions(config))
    for name in ("generate", "logprob", "train", "sync"):
        assert math.isfinite(step.phase(name).seconds)
        assert step.phase(name).seconds > 0.0


@pytest.mark.parametrize(
    ("ranks", "node", "network"), [(1, 450e9, 50e9), (4, 4e9 / 0.75, 50e9), (8, 450e9, 4e9 / 0.75)]
)
def test_links_that_a_gpu_has_not_seen_stay_those_of_its_base(
    tmp_path: Path, ranks: int, node: float, network: float
) -> None:
    base = read_machine("h100")
    links = dict.fromkeys(("node_bandwidth", "network_bandwidth"), 4e9)
    links |= dict.fromkeys(("node_latency", "network_latency"), 0.5)
    found = {"gpus_per_node": min(ranks, 4), "link_efficiency": 1.0, "host_bandwidth": 3e9, **links}
    file = tmp_path / "here.yaml"
    kept = calibration._beside_base(found, base, ranks)
    file.write_text(calibration.machine_text({"base": "h100", **kept}))
    machine = read_machine(file)
    assert (machine.gpus_per_node, machine.node_bandwidth, machine.network_bandwidth) == (8, node, network)
    assert (machine.node_latency == 0.5, machine.network_latency == 0.5) == (ranks == 4, ranks == 8)
    assert machine.host_bandwidth * machine.link_efficiency == pytest.approx(3e9)


@pytest.mark.long
def test_the_tool_prints_a_line_for_each_phase_and_its_status_says_whether_one_is_off(tmp_path: Path) -> None:
    # How far off is a measurement: docs/measurements/planner_times.md.
    config = write_tiny_run(tmp_path)
    done = subprocess.run(
        [sys.executable, str(TOOL), str(config), "--ranks", "2", "--steps", "3"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["generate", "grade", "logprob", "train", "sync", "step"], (
        done.stdout + done.stderr[-3000:]
    )
    assert all(float(seconds) >= 0.0 for row in rows for seconds in row[1:3])
    offs = [abs(float(row[5].strip(" %"))) for row in rows[:-1] if row[5].strip()]
    assert offs
    assert done.returncode in ({1} if max(offs) > 25.0 else {0} if max(offs) < 25.0 else {0, 1})

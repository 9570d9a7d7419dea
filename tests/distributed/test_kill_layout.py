"""A run whose experts and sequences are shared out over ranks is killed, and ends as if nothing had happened."""

import os
import signal
import time

import pytest
from helpers.tiny_run import (
    end_session,
    finish,
    metric_lines,
    metrics_without_times,
    start_run,
    write_tiny_run,
)

STEPS = 6
OVERRIDES = (
    *("parallel.context=2", "parallel.expert=2", "optimizer.distributed=true"),
    *("moe.routing_replay=true", "moe.aux_loss_coefficient=0.01"),
)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_with_context_and_expert_ranks_ends_as_if_nothing_had_happened(tmp_path):
    file = write_tiny_run(
        tmp_path, family="qwen3-moe", run={"steps": STEPS}, checkpoint={"every": 1, "keep_last": 2}
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start_run(file, f"run.output_dir={undisturbed}", *OVERRIDES, processes=2), seconds=200)
    process = start_run(file, f"run.output_dir={killed}", *OVERRIDES, processes=2)
    try:
        end = time.monotonic() + 120
        while metric_lines(killed) < 3 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_session(process)
    assert 3 <= metric_lines(killed) < STEPS, "the run was over before it could be killed: raise STEPS"
    finish(start_run(file, f"run.output_dir={killed}", *OVERRIDES, processes=2), seconds=200)
    lines = metrics_without_times(killed)
    assert lines == metrics_without_times(undisturbed)
    assert [line["step"] for line in lines if "policy_loss" in line] == list(range(1, STEPS + 1))
    assert all(line["routing_replayed"] > 0.8 for line in lines if "policy_loss" in line)

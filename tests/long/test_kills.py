"""A run is killed ten times at random moments and started again with the same command: nothing is lost."""

import os
import random
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

from megatron_laser.trainer.checkpoint import folder as folders

pytestmark = [pytest.mark.long, pytest.mark.distributed, pytest.mark.timeout(3600)]

KILLS = 10
STEPS = 120
DISTRIBUTED = "optimizer.distributed=true"
EXPERTS = ["moe.routing_replay=true", "moe.aux_loss_coefficient=0.01", "moe.z_loss_coefficient=0.001"]
LAYOUTS = {
    "1 process": (1, []),
    "data 2": (2, [DISTRIBUTED]),
    "tensor 2": (2, ["parallel.tensor=2", "checkpoint.asynchronous=true"]),
    "context 2": (2, ["parallel.context=2", DISTRIBUTED, "rollout.oversample=1.5"]),
    "experts, expert 2": (2, ["parallel.expert=2", DISTRIBUTED, "rollout.oversample=1.5", *EXPERTS]),
}


def kill(process, folder, target, rng):
    """SIGKILL to the whole session a moment after step `target`; one time in four while it still starts."""
    end = time.monotonic() + 180
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0.0, 8.0))
    else:
        while metric_lines(folder) < target and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_ten_times_ends_as_if_nothing_had_happened(tmp_path, layout):
    processes, overrides = LAYOUTS[layout]
    file = write_tiny_run(
        tmp_path,
        family="qwen3-moe" if layout.startswith("experts") else "qwen2",
        run={"steps": STEPS},
        checkpoint={"every": 5, "keep_last": 2},
        rollout={"prompts_per_step": 8},
    )
    rng = random.Random(layout)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start_run(file, f"run.output_dir={undisturbed}", *overrides, processes=processes), seconds=1200)
    kills = 0
    for target in sorted(rng.sample(range(1, STEPS - 10), KILLS)):
        process = start_run(file, f"run.output_dir={killed}", *overrides, processes=processes)
        try:
            kill(process, killed, target, rng)
        except ProcessLookupError:
            break
        finally:
            end_session(process)
        kills += process.returncode == -signal.SIGKILL
        for _, path in folders.published(killed / "checkpoints"):
            folders.verify(path)
    finish(start_run(file, f"run.output_dir={killed}", *overrides, processes=processes), seconds=1200)
    assert kills == KILLS, "the run was over before it could be killed: raise STEPS"
    assert metrics_without_times(killed) == metrics_without_times(undisturbed)
    again = finish(start_run(file, f"run.output_dir={killed}", *overrides, processes=processes), seconds=1200)
    assert f"has finished its {STEPS} steps: nothing to do" in again

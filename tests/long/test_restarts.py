"""torchrun starts the ranks again after one was killed, and the run goes on from its checkpoint."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.torchrun import worker_environment

pytestmark = [pytest.mark.long, pytest.mark.distributed, pytest.mark.timeout(600)]

# Killed once, in step 3 of the first life; what torchrun counts is right on a single node.
DYING = """
import os, signal, sys
from megatron_laser.cli import app
from megatron_laser.trainer.trainer import Trainer
train_step = Trainer.train_step
def dying(self, flat, number):
    rank, life = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if (number, rank, life) == (3, sys.argv[1], "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, flat, number)
Trainer.train_step = dying
app(["train", *sys.argv[2:]])
"""


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "--max-restarts", "1", str(script), *map(str, arguments)],
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, output[-5000:]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_whose_rank_was_killed_comes_back_and_ends_as_if_nothing_had_happened(tmp_path, killed):
    file, script = write_tiny_run(tmp_path), tmp_path / "dying.py"
    script.write_text(DYING)
    for out, rank in ((tmp_path / "undisturbed", "none"), (tmp_path / "out", killed)):
        torchrun(script, rank, file, f"run.output_dir={out}", "run.deadline=20")
    assert (tmp_path / "out" / "FINISHED").exists()
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(tmp_path / "undisturbed")

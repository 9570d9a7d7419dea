"""`megatron_laser train` with a fault, for test_faults.py and test_signals.py.

    faulty_run.py FAULT RANK STEP RUN.yaml [OVERRIDES]

FAULT happens on RANK when step STEP is to be trained: die, stop (SIGSTOP), hang (asleep in Python), sigterm,
sigusr1, sigusr2, full (no space left on this rank's disk, from STEP on) or none.
"""

import os
import signal
import sys
import time

from megatron_laser.cli import app
from megatron_laser.trainer.checkpoint import torch_dist
from megatron_laser.trainer.trainer import Trainer


def asleep():
    time.sleep(600)


def no_space(*arguments, **settings):
    raise OSError(28, "No space left on device")


def fill_disk():
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    FileSystemWriter.write_data = no_space


FAULTS = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": asleep,
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigusr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "sigusr2": lambda: os.kill(os.getpid(), signal.SIGUSR2),
    "full": fill_disk,
    "none": lambda: None,
}


def main():
    fault, rank, step, *command = sys.argv[1:]
    train_step = Trainer.train_step

    def faulty(self, flat, number):
        if number == int(step) and os.environ.get("RANK", "0") == rank:
            FAULTS[fault]()
        return train_step(self, flat, number)

    Trainer.train_step = faulty
    if fault == "die in save":
        Trainer.train_step = train_step
        write = torch_dist.write_sharded

        def dying(entries, folder, group):
            write(entries, folder, group)
            if folder.name == f"step_{int(step):08d}.partial" and os.environ.get("RANK", "0") == rank:
                os.kill(os.getpid(), signal.SIGKILL)

        torch_dist.write_sharded = dying
    app(["train", *command])


if __name__ == "__main__":
    main()

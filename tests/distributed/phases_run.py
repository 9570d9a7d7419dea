"""`megatron_laser train` that is slow in one phase, for test_stop_phases.py.

    phases_run.py PHASE FOLDER RUN.yaml [OVERRIDES]

Rank 0 writes FOLDER/reached when it is in PHASE. A phase that a signal cuts off takes half a minute or more there;
one that is finished takes a second and a half.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import megatron_laser.loop as loop
from megatron_laser.cli import main as command_line
from megatron_laser.evaluation.validation import RunEvaluation
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.run import export, recorder
from megatron_laser.run.controller import Controller
from megatron_laser.trainer.checkpoint import torch_dist
from megatron_laser.trainer.trainer import Trainer

FINISHED, CUT_OFF = 1.5, 2.0  # seconds: of a phase; of each token or tensor of a phase
RANK = int(os.environ.get("RANK", "0"))
PHASE, FOLDER = sys.argv[1], Path(sys.argv[2])
slow_tokens = False


def reached():
    if RANK == 0:
        (FOLDER / "reached").touch()


def patch(owner, name, before=lambda *_, **__: None):
    """Call `before` with the arguments first."""
    work = getattr(owner, name)

    def patched(*arguments, **settings):
        before(*arguments, **settings)
        return work(*arguments, **settings)

    setattr(owner, name, patched)


def linger(seconds=FINISHED):
    reached()
    time.sleep(seconds)


def start(*arguments, **settings):
    if RANK == 0:  # the other one goes on, to where it waits in a collective
        linger(60.0)


def sample_slowly(*arguments, **settings):
    global slow_tokens
    slow_tokens = True
    reached()


def when(wanted, work, position=1):
    """`work`, where the argument at `position` is `wanted`."""

    def called(*arguments, **settings):
        if arguments[position] == wanted:
            work()

    return called


def export_slowly():
    write = export.write_hf_folder

    def slowly(weights):
        for item in weights:
            time.sleep(CUT_OFF)
            yield item

    def patched(weights, *arguments, **settings):
        reached()
        return write(slowly(weights), *arguments, **settings)

    export.write_hf_folder = patched


def hang():
    import torch.distributed as dist

    reached()
    dist.HashStore().wait(["never"], timedelta(seconds=120))  # no line of Python runs meanwhile


def save_slowly():
    def before(entries, folder, group):
        if folder.name.startswith("step_00000002"):
            linger()

    patch(torch_dist, "write_sharded", before)


SLOW = {
    "start": lambda: patch(Trainer, "__init__", start),
    "first evaluation": lambda: patch(RunEvaluation, "run", sample_slowly),
    "rollout": lambda: patch(Controller, "collect", when(2, sample_slowly)),
    "train": lambda: patch(Trainer, "train_step", when(2, linger, position=2)),
    "hang": lambda: patch(Trainer, "train_step", when(2, hang, position=2)),
    "sync": lambda: patch(
        loop, "sync_weights", lambda *_, version: linger() if version == 2 and RANK == 0 else None
    ),
    "evaluate": lambda: patch(RunEvaluation, "run", when(2, sample_slowly, position=2)),
    "save": save_slowly,
    "asynchronous save": save_slowly,
    "export": export_slowly,
    "final evaluation": lambda: patch(Controller, "evaluate_last", sample_slowly),
    "final report": lambda: patch(recorder, "write_report", lambda *_: linger()),
}


def main():
    patch(InProcessEngine, "decode", lambda *_: time.sleep(CUT_OFF) if slow_tokens else None)
    SLOW[PHASE]()
    sys.argv[1:] = ["train", *sys.argv[3:]]
    command_line()


if __name__ == "__main__":
    main()

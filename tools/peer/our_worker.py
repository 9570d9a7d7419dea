"""Our side: `megatron_laser.loop.train` as it is, with a pause between blocks of steps.

    python -m peer.our_worker CONFIG.yaml

The Controller waits for its turn before it collects a rollout. Phases come from the run's own metrics.jsonl; only
grading, which happens while responses finish, is timed here.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future

import torch
import transformers

from megatron_laser.config import load_config
from megatron_laser.loop import train
from megatron_laser.rewards import Facts, Grade, GradingPool
from megatron_laser.run.controller import Controller
from peer.turns import Turns

turns = Turns()
collect, submit = Controller.collect, GradingPool.submit


def collect_in_turn(self: Controller, step: int) -> str:
    """Wait for the turn, then collect as always."""
    turns.next_step()
    return collect(self, step)


def timed_submit(self: GradingPool, response: str, answer: str, facts: Facts | None = None) -> Future[Grade]:
    """Submit as always, and note the time in which responses are handed to the graders."""
    started = time.perf_counter()
    grade = submit(self, response, answer, facts)
    turns.add("submit", time.perf_counter() - started)
    return grade


def main(path: str) -> None:
    """Train the run of the YAML at `path`, in turns."""
    config = load_config(path)
    torch.set_num_threads(1)
    Controller.collect = collect_in_turn  # type: ignore[method-assign]
    GradingPool.submit = timed_submit  # type: ignore[method-assign]
    turns.describe(
        torch=torch.__version__, transformers=transformers.__version__, threads=torch.get_num_threads()
    )
    train(config)


if __name__ == "__main__":
    main(sys.argv[1])

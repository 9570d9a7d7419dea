"""Our side: `megatron_laser.loop.train` as it is, with a pause between blocks of steps.

    python -m peer.our_worker CONFIG.yaml

The loop's Controller is replaced by a subclass that waits for its turn before it collects a rollout. Phases come
from the run's own metrics.jsonl; only grading, which happens while responses finish, is timed here.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from typing import Any

import torch
import transformers

from megatron_laser import loop
from megatron_laser.config import load_config
from megatron_laser.rewards import Grade, GradingPool
from megatron_laser.run import controller as controller_module
from peer.turns import Turns

turns = Turns()


class PacedController(controller_module.Controller):
    """A Controller that takes turns with another trainer."""

    def collect(self, step: int) -> str:
        """Wait for the turn, then collect as always."""
        turns.next_step()
        return super().collect(step)


class TimedGradingPool(GradingPool):
    """A GradingPool that notes the time spent where responses are handed to it."""

    def submit(self, response: str, answer: str) -> Future[Grade]:
        """Time and pass on."""
        started = time.perf_counter()
        grade = super().submit(response, answer)
        turns.add("submit", time.perf_counter() - started)
        return grade


def main(path: str) -> None:
    """Train the run of the YAML at `path`, in turns."""
    config = load_config(path)
    torch.set_num_threads(1)
    modules: tuple[Any, Any] = (loop, controller_module)
    modules[0].Controller = PacedController
    modules[1].GradingPool = TimedGradingPool
    turns.describe(
        torch=torch.__version__, transformers=transformers.__version__, threads=torch.get_num_threads()
    )
    loop.train(config)


if __name__ == "__main__":
    main(sys.argv[1])

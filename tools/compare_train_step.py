#!/usr/bin/env python
"""Is the train step of one checkout slower than that of another? Both take turns in the same minutes.

    python tools/compare_train_step.py OLD_TREE NEW_TREE              # about five minutes
    git worktree add /tmp/old COMMIT                                  # makes OLD_TREE

Each tree's `bench step` trainers live in a process of their own (one thread); a round is a step of each process, in an
order that is turned around from round to round. Printed are the median seconds and the median of new / old, round by
round, with a 95 % interval. Both trees use the Python that runs this. A tree that needs other packages is given as
TREE:FOLDER, with a folder that is searched before the environment:

    pip install --no-deps --target /tmp/mcore megatron-core==0.16.1   # what commits up to 519c9fa and around it need
    python tools/compare_train_step.py /tmp/old:/tmp/mcore NEW_TREE

The exit status is 0 whatever the ratio is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(prompts=4, samples=8, response_length=256, hidden=128, layers=4, vocabulary=8192)
ARMS = ("LaSeR", "GRPO")
WARM_UP = 2


def run_worker(arm: str, shape: dict[str, int]) -> None:
    """With a tree on PYTHONPATH: one train step for each line `run N` of the standard input, N times."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints goes into the log

    import megatron_laser
    from megatron_laser.model import platform

    platform.install()
    import torch

    from megatron_laser.benchmarks.step import StepBenchmark

    torch.set_num_threads(1)
    benchmark = StepBenchmark(**shape)
    # Older trees have the method under a private name.
    flat = getattr(benchmark, "rollouts", None) or benchmark._rollouts
    flat = flat()
    with tempfile.TemporaryDirectory() as scratch:
        benchmark.save_model(Path(scratch))
        trainer = benchmark._trainers(Path(scratch), budget=max(4096, int(flat.lengths.max())))[arm]
        steps = 0

        def answer(message: dict) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        answer({"ready": {"package": megatron_laser.__file__}})
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line.split()[1])):
                steps += 1
                started = time.perf_counter()
                trainer.train_step(flat, steps)
                platform.synchronize()
                seconds.append(time.perf_counter() - started)
            answer({"steps": seconds})


def compare(
    trees: list[str], arm: str, rounds: int, shape: dict[str, int], deadline: float
) -> list[list[float]]:
    """Seconds of each tree, one figure a round."""
    from peer.workers import Worker

    seconds: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as logs:
        workers: list[Worker] = []
        try:
            for number, tree in enumerate(trees):
                command = [sys.executable, __file__, "--worker", json.dumps([arm, shape])]
                environment = {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
                log = Path(logs) / f"{number}.log"
                workers.append(Worker(tree, command, environment, log, deadline=deadline))
            for worker, tree in zip(workers, trees, strict=True):
                package = Path(worker.ready()["package"]).resolve()
                if not package.is_relative_to(tree.split(os.pathsep)[0]):
                    raise SystemExit(f"{tree}: megatron_laser was imported from {package}")
            for worker in workers:
                worker.run(WARM_UP)
            for number in range(rounds):
                for index in (0, 1) if number % 2 else (1, 0):
                    seconds[index] += workers[index].run(1)
        finally:
            for worker in workers:
                worker.close()
    return seconds


def main() -> None:
    """Parse the command line, take turns, print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", nargs="*", metavar="TREE", help="the old checkout, then the new one")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that are counted; default: 20")
    parser.add_argument("--arm", choices=ARMS, default=ARMS[0], help="whose train step; default: LaSeR")
    parser.add_argument(
        "--deadline", type=float, default=300.0, help="seconds for any one step; default: 300"
    )
    for name, default in SHAPE.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=f"as in bench step; default: {default}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        run_worker(*json.loads(arguments.worker))
        return
    trees = [
        os.pathsep.join(str(Path(folder).resolve()) for folder in tree.split(os.pathsep))
        for tree in arguments.trees
    ]
    whole = all((Path(tree.split(os.pathsep)[0]) / "megatron_laser").is_dir() for tree in trees)
    if len(trees) != 2 or not whole or arguments.rounds < 1:
        parser.error("expected two checkouts, OLD_TREE and NEW_TREE, each with a folder megatron_laser")
    sys.path.insert(0, str(ROOT))
    from megatron_laser.benchmarks.measure import median_ratio

    shape = {name: getattr(arguments, name) for name in SHAPE}
    old, new = compare(trees, arguments.arm, arguments.rounds, shape, arguments.deadline)
    for tree, seconds in zip(trees, (old, new), strict=True):
        print(f"{statistics.median(seconds):9.4f} s  {tree}")
    middle, low, high = median_ratio(new, old)
    print(
        f"{arguments.arm} train step, new / old: {middle:.4f}, 95 % interval {low:.4f} to {high:.4f}, "
        f"{arguments.rounds} interleaved rounds"
    )


if __name__ == "__main__":
    main()

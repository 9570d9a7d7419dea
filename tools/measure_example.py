#!/usr/bin/env python
"""GRPO and LaSeR on an example over several seeds, as tables: the figures of docs/measurements/<example>.md.

    python tools/measure_example.py tiny_sum               # seeds 2 3 4, both methods at a time, one thread each
    python tools/measure_example.py smollm2                # seed 1, one method after the other, all cores
    python tools/measure_example.py smollm2 --only-table   # from runs that are there already

tiny_sum's recipe was chosen on seed 1 and the validation split; its table is of other seeds and the test split.
Finished runs are not run again, interrupted ones continue.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # the package that the runs use, installed or not

from megatron_laser.algorithms.metrics import auroc, bootstrap_interval  # noqa: E402
from megatron_laser.evaluation.records import EvaluationRecord, read_records  # noqa: E402
from megatron_laser.evaluation.summary import by_problem, evaluation_detail  # noqa: E402

METHODS = ("grpo", "laser")
COLUMNS = {
    "accuracy": "accuracy",
    "self_reward_f1": "F1",
    "self_reward_auroc": "AUROC score",
    "mean_logprob_auroc": "AUROC mean log-prob",
    "length_auroc": "AUROC length",
    "self_reward_ece": "ECE",
    "majority": "majority@8",
    "weighted_majority": "weighted@8",
    "best_of": "best@8",
    "pass": "pass@8",
}
_RESAMPLES = 400  # each sorts all scores


@dataclass(frozen=True)
class Example:
    """How an example is measured, and what is asked of it."""

    seeds: tuple[int, ...]
    side_by_side: bool
    """Both methods at a time, one thread each; or one after the other with every core."""
    accuracy_gain: float
    accuracy_loss: float
    """The most that LaSeR's accuracy may be below GRPO's."""
    f1: float
    auroc: float
    over_untrained: float
    """The least by which LaSeR's F1 and AUROC are above those of GRPO's score, which nobody trained."""


EXAMPLES = {
    "tiny_sum": Example((2, 3, 4), True, 0.12, 0.05, 0.70, 0.75, 0.10),
    "smollm2": Example((1,), False, 0.15, 0.03, 0.75, 0.80, 0.15),
}


@dataclass(frozen=True)
class Evaluation:
    """A run's evaluation of the test split at one step."""

    summary: dict[str, float | None]
    """Null or missing: undefined, such as AUROC with one class, or votes where answers cannot be compared."""
    records_path: Path

    def number(self, name: str) -> float:
        """NaN where it is undefined."""
        value = self.summary.get(name)
        return math.nan if value is None else value

    @property
    def records(self) -> list[EvaluationRecord]:
        """Its responses."""
        return read_records(self.records_path)


def train(example: str, seeds: Sequence[int], folder: Path, overrides: list[str]) -> None:
    """Train both methods with each seed; what is finished is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    together = EXAMPLES[example].side_by_side
    threads = 1 if together else len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for seed in seeds:
        running: list[tuple[str, subprocess.Popen[bytes]]] = []
        for method in METHODS:
            target = folder / f"{method}_{seed}"
            command = [sys.executable, "-m", "megatron_laser", "train"]
            command += [str(ROOT / "examples" / example / f"{method}.yaml"), f"run.seed={seed}"]
            command += [f"run.output_dir={target}", "logging.live=off", *overrides]
            print(f"{method}, seed {seed}: see {target}.log", flush=True)
            with Path(f"{target}.log").open("a") as log:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            running.append((f"{target}.log", process))
            if not together:
                wait_for(running)
        wait_for(running)


def wait_for(running: list[tuple[str, subprocess.Popen[bytes]]]) -> None:
    """Until all have ended; `running` is (log, process)."""
    failed = [log for log, process in running if process.wait()]
    if failed:
        raise SystemExit(f"a run failed, see {' and '.join(failed)}")


def evaluations(folder: Path) -> tuple[Evaluation, Evaluation]:
    """The first and the last evaluation on the test split."""
    files = sorted(
        (folder / "evaluation").glob("test_step_*.json"), key=lambda path: int(path.stem.rsplit("_", 1)[1])
    )
    if len(files) < 2:
        raise SystemExit(f"{folder} has no evaluation before and after training; run it first")
    first, last = (
        Evaluation(json.loads(path.read_text()), path.with_suffix(".jsonl"))
        for path in files[:: len(files) - 1]
    )
    return first, last


def tables(example: str, folder: Path, seeds: Sequence[int]) -> str:
    """Markdown: one row a run and means; every figure with its interval; what was asked for and what came out.

    Args:
        folder: holds <method>_<seed>, output folders of finished runs.
    """
    runs = {(method, seed): evaluations(folder / f"{method}_{seed}") for method in METHODS for seed in seeds}
    before = next(iter(runs.values()))[0]
    shown = {"base model": before}
    shown |= {f"{method}, seed {seed}": after for (method, seed), (_, after) in runs.items()}
    means = {
        method: {
            key: statistics.fmean(runs[method, seed][1].number(key) for seed in seeds)
            for key in (*COLUMNS, "weighted_minus_majority")
        }
        for method in METHODS
    }
    lines = [
        "| run | " + " | ".join(COLUMNS.values()) + " | weighted - majority (95 %) |",
        "|---" * (len(COLUMNS) + 2) + "|",
        *(row(name, evaluation) for name, evaluation in shown.items()),
    ]
    for method in METHODS if len(seeds) > 1 else ():
        cells = " | ".join(shown_number(means[method][key], form="**{:.3f}**") for key in COLUMNS)
        gain = shown_number(means[method]["weighted_minus_majority"], form="**{:+.3f}**")
        lines.append(f"| **{method}, mean** | {cells} | {gain} |")
    lines += ["", *interval_table(shown), "", *target_table(EXAMPLES[example], before, means)]
    return "\n".join(lines)


def row(name: str, evaluation: Evaluation) -> str:
    """One run as a line of the table."""
    cells = " | ".join(shown_number(evaluation.number(key)) for key in COLUMNS)
    gain = [evaluation.number(f"weighted_minus_majority{part}") for part in ("", "_low", "_high")]
    return f"| {name} | {cells} | {shown_number(*gain, form='{:+.3f} [{:+.3f}, {:+.3f}]')} |"


def shown_number(*values: float, form: str = "{:.3f}") -> str:
    """Formatted; blank where it is undefined."""
    return form.format(*values) if all(map(math.isfinite, values)) else ""


def interval_table(shown: dict[str, Evaluation]) -> list[str]:
    """One column for each of `shown`, with 95 % bootstrap intervals over problems."""
    columns = [intervals(evaluation.records) for evaluation in shown.values()]
    lines = ["| 95 % intervals over problems | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for name in dict.fromkeys(name for column in columns for name in column):
        values = (column.get(name, (math.nan,) * 3) for column in columns)
        cells = (shown_number(*value, form="{:.3f} [{:.3f}, {:.3f}]") for value in values)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def intervals(records: list[EvaluationRecord]) -> dict[str, tuple[float, float, float]]:
    """Figure -> (value, low, high)."""
    detail = evaluation_detail(records)
    last = {
        name: tuple(curve[part][-1] for part in ("mean", "low", "high"))
        for name, curve in detail["curves"].items()
    }
    k = len(detail["curves"]["average"]["mean"])
    figures: dict[str, Any] = {"accuracy": last["average"]}
    for name, label in (("f1", "F1"), ("auroc", "AUROC of the score"), ("ece", "ECE")):
        figures[label] = tuple(detail["verification"]["all"][name][part] for part in ("value", "low", "high"))
    scored = [[r for r in problem if r.verifiable] for problem in by_problem(records)]
    figures["AUROC of mean log-prob"] = _auroc_interval(scored, lambda record: record.mean_logprob)
    figures["AUROC of length"] = _auroc_interval(scored, lambda record: record.response_ids_length)
    for name, label in (
        ("majority", f"majority of {k}"),
        ("weighted_majority", f"majority of {k} weighted by the score"),
        ("logprob_majority", f"majority of {k} weighted by mean log-prob"),
        ("best_of", f"best of {k} by the score"),
        ("pass", f"pass@{k}"),
    ):
        if name in last:
            figures[label] = last[name]
    return figures


def _auroc_interval(
    problems: list[list[EvaluationRecord]], value: Callable[[EvaluationRecord], float | None]
) -> tuple[float, float, float]:
    pairs = [[(value(r), r.right) for r in problem if value(r) is not None] for problem in problems]

    def statistic(chosen: list[list[tuple[float | None, bool]]]) -> float:
        joined = [pair for problem in chosen for pair in problem]
        return auroc([x for x, _ in joined], [float(right) for _, right in joined])

    return statistic(pairs), *bootstrap_interval(pairs, seed=0, num_resamples=_RESAMPLES, statistic=statistic)


def target_table(example: Example, before: Evaluation, means: dict[str, dict[str, float]]) -> list[str]:
    """What was asked for beside what came out.

    Args:
        before: of the base model. means: method -> name of a summary -> mean over seeds.
    """
    grpo, laser = means["grpo"], means["laser"]
    least = [
        ("accuracy gain, GRPO", grpo["accuracy"] - before.number("accuracy"), example.accuracy_gain),
        ("accuracy gain, LaSeR", laser["accuracy"] - before.number("accuracy"), example.accuracy_gain),
        ("LaSeR's accuracy minus GRPO's", laser["accuracy"] - grpo["accuracy"], -example.accuracy_loss),
        ("LaSeR's F1", laser["self_reward_f1"], example.f1),
        ("LaSeR's AUROC", laser["self_reward_auroc"], example.auroc),
    ]
    least += [
        (
            f"LaSeR's {label} minus that of GRPO's untrained score",
            laser[f"self_reward_{name}"] - grpo[f"self_reward_{name}"],
            example.over_untrained,
        )
        for name, label in (("f1", "F1"), ("auroc", "AUROC"))
    ]
    lines = ["| means over the seeds | value | target | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {shown_number(value)} | >= {target:.2f} | {verdict(value >= target)} |"
        for name, value, target in least
    ]
    gain, ahead = laser["weighted_minus_majority"], laser["self_reward_auroc"] - laser["mean_logprob_auroc"]
    signed = [shown_number(value, form="{:+.3f}") for value in (gain, ahead)]
    lines.append(f"| LaSeR's weighted vote minus its majority | {signed[0]} | > 0 | {verdict(gain > 0)} |")
    lines.append(f"| LaSeR's score against its mean log-prob, AUROC | {signed[1]} | no target | |")
    return lines


def verdict(met: bool) -> str:
    """What is undefined is missed."""
    return "met" if met else "**missed**"


def main() -> None:
    """Parse the command line, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("example", choices=sorted(EXAMPLES), help="a folder of examples/")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 2 3 4 for tiny_sum, 1 for smollm2")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: runs/<example>_seeds")
    parser.add_argument(
        "--only-table", action="store_true", help="train nothing, read the runs that are there"
    )
    parser.add_argument("overrides", nargs="*", help="settings for every run, such as run.steps=200")
    arguments = parser.parse_intermixed_args()
    seeds = arguments.seeds or EXAMPLES[arguments.example].seeds
    folder = arguments.runs or ROOT / "runs" / f"{arguments.example}_seeds"
    if not arguments.only_table:
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / arguments.example / "prepare.py")], check=True
        )
        train(arguments.example, seeds, folder, arguments.overrides)
    print(tables(arguments.example, folder, seeds))


if __name__ == "__main__":
    main()

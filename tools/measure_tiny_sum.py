#!/usr/bin/env python
"""GRPO and LaSeR on examples/tiny_sum over several seeds, as a table: the figures of docs/measurements/tiny_sum.md.

    python tools/measure_tiny_sum.py                 # seeds 2 3 4, both methods at a time, one thread each
    python tools/measure_tiny_sum.py --only-table    # from runs that are there already

The recipe was chosen on seed 1 and the validation split; the table is of other seeds and the test split.
Finished runs are not run again, interrupted ones continue.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny_sum"
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
ALLOWED_ACCURACY_LOSS = 0.05


def run_seed(seed: int, folder: Path, extra: list[str]) -> None:
    """Train both methods with `seed`, side by side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for method in METHODS:
        target = folder / f"{method}_{seed}"
        command = [sys.executable, "-m", "megatron_laser", "train", str(EXAMPLE / f"{method}.yaml")]
        command += [f"run.seed={seed}", f"run.output_dir={target}", "logging.live=off", *extra]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{method}_{seed}.log").open("a") as log:
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"seed {seed} failed, see {folder}/*_{seed}.log")


def evaluations(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation on the test split."""
    files = sorted(
        (folder / "evaluation").glob("test_step_*.json"), key=lambda path: int(path.stem.rsplit("_", 1)[1])
    )
    if len(files) < 2:
        raise SystemExit(f"{folder} has no evaluation before and after training; run it first")
    return json.loads(files[0].read_text()), json.loads(files[-1].read_text())


def table(folder: Path, seeds: list[int]) -> str:
    """Markdown: one row a run, means, and what was asked for beside what came out."""
    lines = [
        "| run | " + " | ".join(COLUMNS.values()) + " | weighted - majority (95 %) |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    runs = {(method, seed): evaluations(folder / f"{method}_{seed}") for method in METHODS for seed in seeds}
    before = next(iter(runs.values()))[0]
    lines.append(row("base model", before))
    for (method, seed), (_, after) in runs.items():
        lines.append(row(f"{method}, seed {seed}", after))
    means = {}
    for method in METHODS:
        finals = [runs[method, seed][1] for seed in seeds]
        means[method] = {key: statistics.fmean(final[key] for final in finals) for key in COLUMNS}
        cells = " | ".join(f"**{means[method][key]:.3f}**" for key in COLUMNS)
        difference = statistics.fmean(final["weighted_minus_majority"] for final in finals)
        lines.append(f"| **{method}, mean** | {cells} | **{difference:+.3f}** |")
    grpo, laser = means["grpo"], means["laser"]
    gain = {method: means[method]["accuracy"] - before["accuracy"] for method in METHODS}
    worst = min(runs["laser", seed][1]["self_reward_auroc"] for seed in seeds)
    checks = [
        ("accuracy gain, GRPO", gain["grpo"], ">= 0.12", gain["grpo"] >= 0.12),
        ("accuracy gain, LaSeR", gain["laser"], ">= 0.12", gain["laser"] >= 0.12),
        (
            "LaSeR's accuracy minus GRPO's",
            laser["accuracy"] - grpo["accuracy"],
            ">= -0.05",
            laser["accuracy"] - grpo["accuracy"] >= -ALLOWED_ACCURACY_LOSS,
        ),
        ("LaSeR's F1", laser["self_reward_f1"], ">= 0.70", laser["self_reward_f1"] >= 0.70),
        ("LaSeR's AUROC", laser["self_reward_auroc"], ">= 0.75", laser["self_reward_auroc"] >= 0.75),
        (
            "LaSeR's AUROC minus that of GRPO's untrained score",
            laser["self_reward_auroc"] - grpo["self_reward_auroc"],
            ">= 0.10",
            laser["self_reward_auroc"] - grpo["self_reward_auroc"] >= 0.10,
        ),
        (
            "LaSeR's score against its mean log-prob, AUROC",
            laser["self_reward_auroc"] - laser["mean_logprob_auroc"],
            "no target",
            None,
        ),
        ("LaSeR's AUROC, worst seed", worst, "no target", None),
    ]
    lines += ["", "| means over the seeds | value | target | |", "|---|---|---|---|"]
    verdicts = {True: "met", False: "**missed**", None: ""}
    lines += [f"| {name} | {value:.3f} | {target} | {verdicts[met]} |" for name, value, target, met in checks]
    return "\n".join(lines)


def row(name: str, summary: dict[str, float]) -> str:
    """One run as a line of the table."""
    cells = " | ".join("" if summary.get(key) is None else f"{summary[key]:.3f}" for key in COLUMNS)
    low, high = summary["weighted_minus_majority_low"], summary["weighted_minus_majority_high"]
    return f"| {name} | {cells} | {summary['weighted_minus_majority']:+.3f} [{low:+.3f}, {high:+.3f}] |"


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="default: 2 3 4")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "tiny_sum_seeds", help="folder of the runs"
    )
    parser.add_argument(
        "--only-table", action="store_true", help="train nothing, read the runs that are there"
    )
    parser.add_argument("overrides", nargs="*", help="settings for every run, such as run.steps=200")
    arguments = parser.parse_args()
    if not arguments.only_table:
        subprocess.run([sys.executable, str(EXAMPLE / "prepare.py")], check=True)
        for seed in arguments.seeds:
            run_seed(seed, arguments.runs, arguments.overrides)
    print(table(arguments.runs, arguments.seeds))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Does the planner's time model say what a step takes? Calibrates, predicts, runs, and prints both side by side.

    python tools/measure_planner.py examples/tiny_sum/laser.yaml
    python tools/measure_planner.py examples/tiny_sum/laser.yaml --ranks 2 rollout.prompts_per_step=32

Calibration and run are each a start of torchrun with the same number of ranks, one behind the other. The lengths of
prompts and responses, what prompts begin with, and how evenly ranks were loaded are the run's: the model is of seconds.
The first step is left out. A phase of at least 5 % of the step is off by its share predicted over its share measured;
the exit status is 1 where that is more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

PHASES = ("generate", "grade", "logprob", "train", "sync")
LEAST, MOST = 0.05, 0.25
QUIET = (
    *("evaluation.every=0", "evaluation.baseline=false", "evaluation.max_prompts=1"),
    *("evaluation.final_samples_per_prompt=1", "checkpoint.every=0", "checkpoint.export_hf=false"),
    *("logging.tensorboard=false", "logging.rollouts_every=1", "run.resume=never"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--ranks", type=int, default=1, help="of torchrun")
    parser.add_argument("--steps", type=int, default=4, help="of the run; the first does not count")
    parser.add_argument(
        "--hidden", type=int, help="of random weights in place of the run's model, with --layers"
    )
    parser.add_argument("--layers", type=int, default=8, help="of random weights")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker is not None:
        work(arguments.config, arguments.overrides, arguments.worker)
        return 0
    if arguments.steps < 2:
        parser.error("--steps: 2 or more; the first does not count")
    with tempfile.TemporaryDirectory(prefix="planner-") as scratch:
        folder = Path(scratch)
        own = [
            *arguments.overrides,
            *QUIET,
            f"run.output_dir={folder / 'run'}",
            f"run.steps={arguments.steps}",
        ]
        if arguments.hidden is not None:
            own.append(f"model.path={random_model(arguments, own, folder / 'model')}")
        machine = folder / "machine.yaml"
        script = [str(Path(__file__).resolve())]
        start(arguments.ranks, [*script, "--worker", str(machine), str(arguments.config), *own], folder)
        start(arguments.ranks, ["-m", "megatron_laser", "train", str(arguments.config), *own], folder)
        print(machine.read_text(), file=sys.stderr)
        return compare(arguments.config, own, machine, folder / "run", arguments.ranks)


def random_model(arguments: argparse.Namespace, overrides: list[str], folder: Path) -> Path:
    """The run's model with another width and depth, beside the same tokenizer."""
    from megatron_laser.benchmarks.random_model import save_random_model
    from megatron_laser.config import load_config
    from megatron_laser.model.hf_config import read_hf_config

    path = Path(load_config(arguments.config, overrides).model.path)
    hf = read_hf_config(path)
    hf.hidden_size, hf.intermediate_size = arguments.hidden, 3 * arguments.hidden
    hf.num_hidden_layers = arguments.layers
    hf.head_dim = arguments.hidden // hf.num_attention_heads
    save_random_model(folder, hf)
    for file in [*path.glob("tokenizer*"), *path.glob("generation_config.json")]:
        shutil.copy(file, folder)
    return folder


def start(ranks: int, command: list[str], folder: Path) -> None:
    """Run `command` on so many ranks; on one, as without torchrun. Its output is shown where it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = folder / "log"
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, *(torchrun if ranks > 1 else []), *command],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
    if done.returncode:
        sys.exit(log.read_text()[-5000:] + f"\n{' '.join(command)}: exit status {done.returncode}")


def work(config: Path, overrides: list[str], target: Path) -> None:
    """Calibrate on this rank, for a batch like the run's."""
    from megatron_laser.cli.options import prepare_process
    from megatron_laser.config import load_config
    from megatron_laser.config.process_environment import is_main_process

    loaded = load_config(config, overrides)
    prepare_process("INFO", is_main_process())
    from megatron_laser.model.transformer_engine import settle

    settle(loaded.model.layers)
    from megatron_laser.benchmarks.calibration import calibrate, machine_text
    from megatron_laser.planner.assumptions import read_assumptions

    # Of the training data's first prompts; how long answers are, nobody knows yet.
    prompts = first_prompts(loaded)
    base = read_assumptions(loaded)
    measured = calibrate(loaded, replace(base, prompt_tokens=sum(map(len, prompts)) / len(prompts)))
    if measured is not None:
        target.write_text(machine_text(measured))


def first_prompts(config: Any) -> list[list[int]]:
    """Token ids of the prompts of a step's size from the training data."""
    from megatron_laser.run.preflight import FindingLog, run_preflight

    found = run_preflight(config, FindingLog(stop_at_errors=True), overwrite=True)
    return [
        list(prompt.token_ids) for prompt in found.data.prompts["train"][: config.rollout.prompts_per_step]
    ]


def compare(config: Path, overrides: list[str], machine_file: Path, run: Path, ranks: int) -> int:
    """Print predicted and measured seconds and shares; 1 where a share is off."""
    from megatron_laser.batching.shared_prompts import common_beginning
    from megatron_laser.config import load_config, resolve_plan
    from megatron_laser.planner.assumptions import Assumptions, read_assumptions
    from megatron_laser.planner.machine import read_machine
    from megatron_laser.planner.phase_times import predict_step

    loaded = load_config(config, overrides)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    responses = []
    for row in rows:
        dumped = (run / "rollouts" / f"step_{row['step']}.jsonl").read_text().splitlines()
        responses += [json.loads(line)["response_ids_length"] for line in dumped]
    prompts = first_prompts(loaded)
    base = replace(
        read_assumptions(loaded),
        grading_seconds=0.0,
        common_tokens=float(common_beginning(prompts)),
        imbalance=statistics.mean(row.get("rank_imbalance", 0.0) for row in rows),
    )
    lengths = Assumptions.of_lengths([len(prompt) for prompt in prompts], responses, base=base)
    machine = read_machine(machine_file)
    plan = resolve_plan(loaded, ranks, machine.memory_gib)
    predicted = predict_step(plan, machine, lengths)
    measured = {name: statistics.median(row.get(f"time/{name}", 0.0) for row in rows) for name in PHASES}
    total = sum(measured.values())
    step = statistics.median(row["time/total"] for row in rows)
    found = {phase.name: phase.seconds for phase in predicted.phases}
    whole = sum(found.values())
    print(
        f"{config}, {plan.parameters / 1e6:.1f}M parameters, {ranks} ranks, {plan.batch.sequences} responses of "
        f"{statistics.mean(responses):.1f} tokens behind prompts of {lengths.prompt_tokens:.1f}"
    )
    print("| phase | predicted s | measured s | predicted share | measured share | off by |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    wrong = 0
    for name in PHASES:
        shares = found[name] / whole, measured[name] / total
        off = shares[0] / shares[1] - 1 if shares[1] >= LEAST else None
        wrong += off is not None and abs(off) > MOST
        print(
            f"| {name} | {found[name]:.3f} | {measured[name]:.3f} | {shares[0]:.1%} | {shares[1]:.1%} | "
            f"{'' if off is None else f'{off:+.0%}'} |"
        )
    print(f"| step | {predicted.seconds:.3f} | {step:.3f} | | | {predicted.seconds / step - 1:+.0%} |")
    for phase in predicted.phases:
        print(phase.name, {key: round(value, 4) for key, value in phase.parts.items()}, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

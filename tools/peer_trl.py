"""Seconds per step and accuracy of megatron_laser's GRPO beside those of TRL's GRPOTrainer, on one CPU.

    python tools/peer_trl.py [--config RUN.yaml] [--model FOLDER] [--data FILE] [section.key=value ...]

Both sides start from the same model folder and see the same problems in the same order: 16 prompts, 8 samples
each, temperature 1, one AdamW step for each rollout batch, no KL term, LaSeR off, float32, no activation
recomputation, one thread. Both grade with `megatron_laser.rewards.grade_math`.

TRL: `GRPOTrainer` in an environment of its own, generating through transformers' `generate` (TRL's default
without vLLM), the whole rollout batch in one forward and backward. With one optimizer step for each batch it
has no old-policy pass: the ratio's denominator is the current forward's log-prob, detached. loss_type "dapo"
is the mean over all tokens of the batch, scale_rewards "group" divides by the group's standard deviation (plus
1e-4, ours 1e-6), epsilon 0.2. No progress bar, no reports; it logs every 10 steps, its default. Its default
optimizer, PyTorch's fused AdamW, is left as it is.

Ours: `megatron_laser.loop.train`, the whole loop: in-process generation, Megatron's model, schedule and optimizer,
the transfer of the weights to the engine, and one line of metrics for every step. `on_policy` computes what
TRL computes and is what the ratio is about; `recompute`, the default of a run, has an old-policy pass more.

All sides live at the same time and take turns, blocks of steps in one and then in the next while the others
wait, in an order that is reversed from round to round: the machine's drift meets all alike. A step counts from its
start to the start of the next, so nothing between steps is left out. The first turn of each is a warm-up and
not timed. Medians are over all timed steps; intervals are 95 % bootstraps over rounds.

Phases: `generate` has tokenization and decoding in it; `grade` is the reward; `logprob` the old-policy pass; `train`
forward, loss, backward, clipping and optimizer; `sync` the weights' way to the engine (TRL generates with the
trained model itself); `other` is the rest: batches, advantages, metrics.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from peer.environment import default_folder, trl_python  # noqa: E402
from peer.pages import draw, page, tables  # noqa: E402
from peer.settings import our_run, trl_run  # noqa: E402
from peer.summary import Side, ratio  # noqa: E402
from peer.workers import Worker, WorkerError  # noqa: E402

from megatron_laser.benchmarks.result import command_line, processor  # noqa: E402
from megatron_laser.config.schema.sources import data_files  # noqa: E402

EXAMPLE = ROOT / "examples" / "tiny_sum"
_DEADLINE = 600.0  # seconds for a worker's start, or for one of its turns
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def measure(workers: list[Worker], *, rounds: int, block: int, warm_up: int) -> list[Side]:
    """Let the workers take turns; TRL's side first in the list that is returned, as in `workers`."""
    sides = [Side(worker.name, worker.ready()) for worker in workers]
    for worker, side in zip(workers, sides):
        side.steps += worker.run(warm_up)
    pairs = list(zip(workers, sides))
    for number in range(rounds):
        for worker, side in pairs if number % 2 == 0 else reversed(pairs):
            turn = worker.run(block)
            side.rounds.append(turn)
            side.steps += turn
        done = " ".join(f"{side.name} {side.seconds()[-1].mean():.3f} s" for side in sides)
        print(f"round {number + 1} of {rounds}: {done}", file=sys.stderr, flush=True)
    return sides


def add_our_metrics(side: Side, metrics_file: Path) -> None:
    """Fill in phases, reward and response length from the run's metrics.jsonl."""
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    for step, line in zip(side.steps, (line for line in lines if line["step"] > 0)):
        handed_over = step.pop("submit", 0.0)  # most answers are graded as they are handed over
        step |= {phase: line.get(f"time/{phase}", 0.0) for phase in ("logprob", "train", "sync")}
        step["generate"] = line["time/generate"] - handed_over
        step["grade"] = line.get("time/grade", 0.0) + handed_over
        step["reward"], step["response_length"] = line["reward_mean"], line["response_length_mean"]


def _named(path: Path) -> str:
    """A file's path from the repository's root, with the start of its hash."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "not one file"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{shown} (sha256 {digest})"


def _prepare_example() -> None:
    """Train the example's base model if it is not there yet."""
    if not (EXAMPLE / "base" / "config.json").exists():
        print("making the tiny example's base model (once)", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, str(EXAMPLE / "prepare.py")], check=True)


def main() -> None:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the run as section.key=value")
    parser.add_argument(
        "--config", type=Path, default=EXAMPLE / "grpo.yaml", help="YAML: model, data, sizes, optimizer"
    )
    parser.add_argument("--model", type=Path, help="model folder instead of the YAML's")
    parser.add_argument("--data", type=Path, help="training data instead of the YAML's")
    parser.add_argument("--rounds", type=int, default=12, help="timed turns of each side")
    parser.add_argument("--block", type=int, default=20, help="steps of a turn")
    parser.add_argument("--warm-up", type=int, default=20, help="steps of the first turn, which is not timed")
    parser.add_argument(
        "--environment", type=Path, default=default_folder(), help="folder of TRL's environment"
    )
    parser.add_argument("--trl-python", type=Path, help="a Python that has TRL already")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "peer_trl", help="folder for peer_trl.{json,md,png}"
    )
    options = parser.parse_intermixed_args()
    config, rounds, block, warm_up = options.config, options.rounds, options.block, options.warm_up
    if options.model is None and EXAMPLE in config.resolve().parents:
        _prepare_example()
    settings = list(options.overrides)
    settings += [f"model.path={options.model}"] if options.model else []
    settings += [f"data.train={options.data}"] if options.data else []
    python = options.trl_python or trl_python(options.environment, ROOT / "constraints-cpu.txt")
    steps = warm_up + rounds * block + 1  # a step ends where the next begins: the last one is never begun
    shared = {name: "1" for name in _THREADS} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peer_trl_")))

        def start(name: str, interpreter: Path | str, module: str, argument: Path) -> Worker:
            command = [str(interpreter), "-m", module, str(argument)]
            log = folder / f"{module}-{argument.stem}.log"
            return stack.enter_context(Worker(name, command, shared, log, deadline=_DEADLINE))

        runs = {
            kind: our_run(config, settings, folder, steps=steps, old_logprobs=kind)
            for kind in ("on_policy", "recompute")
        }
        trl_settings = trl_run(runs["on_policy"][0], folder)
        workers = [start("TRL", python, "peer.trl_worker", trl_settings)]
        for kind, (_, path) in runs.items():
            workers.append(start(f"ours, {kind}", sys.executable, "peer.our_worker", path))
        sides = measure(workers, rounds=rounds, block=block, warm_up=warm_up)
        for side, kind in zip(sides[1:], runs):
            add_our_metrics(side, folder / kind / "metrics.jsonl")
    result = _result(sides, runs["on_policy"][0], rounds=rounds, block=block)
    print(tables(result, sides))
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    (output / "peer_trl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(sides, output / "peer_trl.png")
    explanation = (__doc__ or "").split("\n\n", 2)[2]
    (output / "peer_trl.md").write_text(page(result, sides, explanation, "peer_trl.png"), encoding="utf-8")
    print(f"\nwrote {output}/peer_trl.json, .md and .png")


def _result(sides: list[Side], config: Any, *, rounds: int, block: int) -> dict[str, Any]:
    """Everything that is kept, for JSON."""
    trl, ours = sides[0], sides[1]
    rollout = config.rollout
    versions = {
        "TRL": trl.facts["trl"],
        "torch": f"{trl.facts['torch']} (TRL), {ours.facts['torch']} (ours)",
        "transformers": f"{trl.facts['transformers']} (TRL), {ours.facts['transformers']} (ours)",
    }
    return {
        "command": command_line(),
        "facts": {
            "date": datetime.date.today().isoformat(),
            "machine": f"{processor()}; one thread each",
            **versions,
            "model": _named(config.model.path / "model.safetensors"),
            "data": ", ".join(_named(path) for path in data_files(config.data.train)),
            "batch": f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples, at most "
            f"{rollout.max_new_tokens} new tokens, learning rate {config.optimizer.lr:g}",
            "measured": f"{rounds} rounds of {block} steps of each side",
        },
        "ratios": {side.name: ratio(side, trl) for side in sides[1:]},
        "sides": {side.name: side.summary() for side in sides},
    }


if __name__ == "__main__":
    try:
        main()
    except WorkerError as error:
        sys.exit(f"error: {error}")

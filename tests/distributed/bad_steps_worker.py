"""Two ranks: one sample's bad number must make every rank skip the update. Started by test_bad_steps_ranks.py.

Rank 0 writes one JSON object: layout -> list of each rank's findings. What they must be is said in the test.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.layouts import laid_out
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from helpers.torchrun import run_worker

from megatron_laser.distributed import runtime as runtimes
from megatron_laser.trainer.bad_steps import BadStepsError
from megatron_laser.trainer.trainer import Trainer

LAYOUTS = {
    "data 2": [],
    "data 2, distributed, bf16, overlapped": [
        "model.dtype=bfloat16",
        "optimizer.distributed=true",
        "optimizer.overlap_grad_reduce=true",
        "optimizer.overlap_param_gather=true",
    ],
    "tensor 2": ["parallel.tensor=2"],
    "pipeline 2": ["parallel.pipeline=2"],
    "context 2": ["parallel.context=2"],
    "context 2, distributed": ["parallel.context=2", "optimizer.distributed=true"],
}
GROUPS = [[Response(5, True), Response(7, False)], [Response(4, False), Response(6, True)]]


def batch(seed, *, bad=False):
    flat = rollout_batch(GROUPS, seed=seed)
    if bad:
        flat.rollout_logprobs[7] = math.nan  # in sample 1
    return flat


def state(trainer):
    """This rank's own weights, main weights and Adam's numbers, as one list of tensors."""
    trainer.weight_stream()  # finishes an overlapped gather
    tensors = [p.detach().clone() for model in trainer.policy.chunks.models for p in model.parameters()]
    for chained in trainer.policy.optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for main in group["params"]:
                values = [main, *chained.optimizer.state.get(main, {}).values()]
                tensors += [torch.as_tensor(value).detach().clone() for value in values]
    return tensors


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def examine(config, runtime):
    trainer = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
    trainer.train_step(batch(1), 1)
    before = state(trainer)
    result = trainer.train_step(batch(2, bad=True), 2)
    own_is_bad = any(not torch.isfinite(e["total_loss"]) for e in result.updates[0].entries)
    unchanged = equal(state(trainer), before)
    trainer.train_step(batch(3), 3)
    after = state(trainer)
    try:
        trainer.train_step(batch(4, bad=True), 4)
        trainer.train_step(batch(5, bad=True), 5)
        error = ""
    except BadStepsError as raised:
        error = str(raised)
    other = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
    other.train_step(batch(1), 1)
    other.train_step(batch(3), 3)
    return {
        "own_is_bad": own_is_bad,
        "bad": list(result.updates[0].bad),
        "bad_steps": result.metrics["bad_steps"],
        "unchanged": unchanged,
        "as_if_it_had_never_been": equal(after, state(other)),
        "trained": not equal(after, before),
        "error": error,
        "dumped": (Path(config.run.output_dir) / "bad_steps" / "step_5" / "meta.json").is_file(),
    }


def main():
    model, results = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    found = {}
    runtime = None
    for number, (layout, overrides) in enumerate(LAYOUTS.items()):
        config = run_config(
            results.parent / f"{number}_{rank}",
            model,
            *overrides,
            "run.max_bad_steps=2",
            f"run.output_dir={results.parent / f'run_{number}'}",
            laser={"score_token": SCORE_TOKEN, "reasoning_warmup_steps": 0},
            optimizer={"lr": 1e-3},
            policy={"old_logprobs": "rollout"},
            rollout={"prompts_per_step": 2, "samples_per_prompt": 2},
        )
        runtime = laid_out(config, runtime)
        ranks = [None] * runtime.world_size
        dist.all_gather_object(ranks, examine(config, runtime), group=runtime.cpu_group)
        found[layout] = ranks
    if rank == 0:
        results.write_text(json.dumps(found))
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)

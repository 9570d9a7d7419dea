"""Two ranks: each token's values reach rank 0 in every layout as one process has them, and so do spans of phases.

Started by test_token_values_ranks.py.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from helpers.layouts import laid_out
from helpers.plain_training import AT_ONCE, LASER, OPTIMIZER
from helpers.rollouts import STEPS, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from helpers.torchrun import run_worker

from megatron_laser.distributed import runtime as runtimes
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.timeline import Timeline
from megatron_laser.trainer.trainer import Trainer

LAYOUTS = {
    "data 2": [],
    "tensor 2, sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline 2": ["parallel.pipeline=2"],
    "context 2": ["parallel.context=2"],
}


def main():
    folder, model, expected = Path(sys.argv[1]) / os.environ["RANK"], Path(sys.argv[2]), np.load(sys.argv[3])
    torch.set_num_threads(1)
    runtime = None
    flat = rollout_batch(STEPS[0])
    for name, overrides in LAYOUTS.items():
        config = run_config(
            folder / name,
            model,
            "logging.rollouts_every=1",
            "logging.rollouts_tokens=true",
            "batching.tokens_per_micro_batch=80",
            *overrides,
            data={"max_prompt_tokens": 16},
            rollout={"max_new_tokens": 32},
            laser=LASER | AT_ONCE,
            optimizer=OPTIMIZER,
        )
        runtime = laid_out(config, runtime)
        found = Trainer(config, runtime, score_token_id=SCORE_TOKEN).train_step(flat, 1).tokens
        assert (found is not None) == runtime.is_main, name
        if found is not None:
            for values, want in ((found.policy_logprobs, expected[0]), (found.entropy, expected[1])):
                np.testing.assert_allclose(values, want, atol=2e-6, err_msg=name)
    check_timeline(folder, runtime)
    runtimes.stop()


def check_timeline(folder, runtime):
    """Both ranks' spans are in one line of rank 0's file, on the steps that are due."""
    timers = Timers()
    timeline = Timeline(
        runtime, timers, folder, every=2, last_step=0, servers=lambda: [("http://a", 0.0, 1.0)]
    )
    for step in (1, 2, 3):
        with timers("total"), timers("train" if runtime.is_main else "logprob"):
            pass
        timeline.add(step)
    path = folder / "timeline.jsonl"
    assert path.exists() == runtime.is_main
    if runtime.is_main:
        (line,) = map(json.loads, path.read_text().splitlines())
        found = {(span["who"], span["phase"]) for span in line["spans"]}
        ranks = {("rank 0", "total"), ("rank 0", "train"), ("rank 1", "total"), ("rank 1", "logprob")}
        assert line["step"] == 2 and found == ranks | {("server http://a", "generate")}, line


if __name__ == "__main__":
    run_worker(main)

"""Two ranks: the drift of the score is the same in every layout. Started by test_score_drift_ranks.py."""

import os
import sys
from pathlib import Path

import torch
from helpers.held import batch, drifting_trainer, plain_logprobs, plain_metrics, trained
from helpers.layouts import laid_out
from helpers.models import tiny_model
from helpers.runs import run_config
from helpers.torchrun import run_worker

from megatron_laser.distributed import runtime as runtimes

OVERLAPPED = ("distributed", "overlap_grad_reduce", "overlap_param_gather")
LAYOUTS = {
    "data 2": ([], "qwen2"),
    "data 2, overlapped": ([f"optimizer.{name}=true" for name in OVERLAPPED], "qwen2"),
    "tensor 2, sequence": (["parallel.tensor=2", "parallel.sequence=true"], "qwen2"),
    "pipeline 2": (["parallel.pipeline=2"], "qwen2"),
    "context 2": (["parallel.context=2"], "qwen2"),
    "expert 2": (["parallel.expert=2"], "qwen3-moe"),
}
HELD = [0, 2, 3, 4, 5]


def main():
    folder, models = Path(sys.argv[1]) / os.environ["RANK"], Path(sys.argv[2])
    torch.set_num_threads(1)
    runtime = None
    for name, (overrides, family) in LAYOUTS.items():
        config = run_config(folder / name, models / family, *overrides)
        runtime = laid_out(config, runtime)
        trainer, drift = drifting_trainer(folder / name, models / family, runtime, *overrides)
        flat = batch(1)
        drift.hold(flat, 1)
        metrics = drift.measure(1, trainer.train_step(flat, 1))
        model = trained(trainer)
        assert (folder / name / "run" / "held_responses.npz").exists() == runtime.is_main
        if runtime.is_main:
            before = plain_logprobs(tiny_model(family), flat, HELD)
            expected = plain_metrics(flat, HELD, plain_logprobs(model, flat, HELD), before)
            assert metrics.keys() == expected.keys(), name
            for key, want in expected.items():
                assert abs(metrics[key] - want) < 1e-5, (name, key, metrics[key], want)
            assert abs(expected["drift/shift"]) > 0.02, (name, expected)
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)

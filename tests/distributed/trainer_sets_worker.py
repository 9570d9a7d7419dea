"""Two ranks: training on tokens with sets equals the plain implementation. Started by test_trainer_sets_ranks.py."""

import os
import sys
from pathlib import Path

import torch
from helpers.layouts import laid_out
from helpers.models import tiny_model
from helpers.plain_sets import PlainOverSets, batch_with_sets
from helpers.plain_training import AT_ONCE, LASER, OPTIMIZER, TOKEN_MEANS, Plain
from helpers.runs import SCORE_TOKEN, run_config
from helpers.torchrun import run_worker

from megatron_laser.distributed import runtime as runtimes
from megatron_laser.trainer.trainer import Trainer

# The entropy without and with a gradient: two calls over the vocabulary or one, beside that over the sets.
LAYOUTS = {
    "tensor 2, sequence": (["parallel.tensor=2", "parallel.sequence=true"], 0.0),
    "tensor 2, sequence, entropy": (["parallel.tensor=2", "parallel.sequence=true"], 0.02),
    "context 2": (["parallel.context=2"], 0.0),
}


def main():
    folder, model = Path(sys.argv[1]) / os.environ["RANK"], Path(sys.argv[2])
    torch.set_num_threads(1)
    runtime, expected = None, {}
    for name, (overrides, bonus) in LAYOUTS.items():
        config = run_config(
            folder / name,
            model,
            *overrides,
            policy={"old_logprobs": "recompute", "entropy_coefficient": bonus},
            laser=LASER | AT_ONCE,
            optimizer=OPTIMIZER,
        )
        runtime = laid_out(config, runtime)
        flat, _ = batch_with_sets(1, tiny_model("qwen2"), 1.0)
        if bonus not in expected:
            settings = Plain(
                temperature=1.0, old_logprobs="recompute", entropy_coefficient=bonus, **OPTIMIZER, **LASER
            )
            expected[bonus] = PlainOverSets(tiny_model("qwen2"), settings).step(
                flat, with_loss=True, with_mixing=True
            )
        metrics = Trainer(config, runtime, score_token_id=SCORE_TOKEN).train_step(flat, 1).metrics
        for key in ("policy_loss", "grad_norm", "self_reward_loss", *TOKEN_MEANS):
            want = expected[bonus][key]
            assert abs(metrics[key] - want) < 1e-6 + 1e-5 * abs(want), (name, key, metrics[key], want)
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)

"""Trains, saves, resumes and exports with layers of Transformer Engine, one case after the other; for test_te.py.

te_worker.py SOURCES FOLDER PLAN.json
"""

import json
import os
import sys
from pathlib import Path

import te_extension
from helpers.torchrun import run_worker
from te_boot import boot

BACKEND_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def main():
    sources, folder, plan = (Path(argument) for argument in sys.argv[1:])
    boot(sources)

    import torch
    import torch.distributed as dist
    from helpers.rollouts import rollout_batch
    from helpers.runs import SCORE_TOKEN
    from megatron.core import parallel_state
    from te_cases import GROUPS, STEPS, config_of, metrics_of

    from megatron_laser.export import export_hf
    from megatron_laser.trainer import runtime as runtimes
    from megatron_laser.trainer.checkpoint.manager import CheckpointManager
    from megatron_laser.trainer.trainer import Trainer

    torch.set_num_threads(1)
    runtime = None
    for name, case in json.loads(plan.read_text()).items():
        for variable in BACKEND_VARIABLES:  # Megatron sets them for the attention of the case before
            os.environ.pop(variable, None)
        config = config_of(folder, case, name)
        if runtime is None:
            runtime = runtimes.start(config)
        else:
            parallel_state.destroy_model_parallel()
            runtime = runtimes.build_groups(config, runtime.store)
        te_extension.calls.clear()
        trainer = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
        loaded = weights_of(trainer)
        manager = CheckpointManager(config, runtime, trainer.policy)
        metrics = []
        for step in range(1, STEPS):
            metrics.append(metrics_of(trainer.train_step(rollout_batch(GROUPS, seed=step), step)))
        manager.save(STEPS - 1, {"cursor": None} if runtime.is_main else None)
        assert manager.wait(), manager.trouble
        last = rollout_batch(GROUPS, seed=STEPS)
        metrics.append(metrics_of(trainer.train_step(last, STEPS)))
        trained = weights_of(trainer)
        export_hf(config, trainer.weight_stream(), is_main=runtime.is_main)

        resumed = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
        assert CheckpointManager(config, runtime, resumed.policy).resume()["step"] == STEPS - 1
        again = metrics_of(resumed.train_step(last, STEPS))
        if runtime.is_main:
            result = {
                "metrics": metrics,
                "again": again,
                "loaded": loaded,
                "trained": trained,
                "again_trained": weights_of(resumed),
                "calls": dict(te_extension.calls),
                "modules": sorted({type(m).__name__ for m in trainer.policy.chunks.models[0].modules()}),
                "optimizer": type(inner_optimizer(trainer)).__module__,
            }
            torch.save(result, folder / f"{name}.pt")
        else:
            weights_of(resumed)
        dist.barrier()
    runtimes.stop()


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.weight_stream()}


def inner_optimizer(trainer):
    optimizer = trainer.policy.optimizer
    return getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer


if __name__ == "__main__":
    run_worker(main)

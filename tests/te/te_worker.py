"""Trains, saves, resumes and exports with layers of Transformer Engine, one case after the other; for test_te.py.

te_worker.py SOURCES FOLDER
"""

import sys
from pathlib import Path

import te_extension
from helpers.torchrun import run_worker
from te_boot import boot


def main():
    sources, folder = (Path(argument) for argument in sys.argv[1:])
    boot(sources)

    import torch
    import torch.distributed as dist
    from te_breaks import broken, spoil_unread_gradients
    from te_cases import BROKEN_CASES, CASES

    from megatron_laser.distributed import runtime as runtimes

    torch.set_num_threads(1)
    spoil_unread_gradients()
    for name, case in CASES.items():
        config, runtime = begin(folder, name, case)
        result = rehearse(config, runtime)
        if runtime.is_main:
            torch.save(result, folder / f"{name}.pt")
        dist.barrier()
    for name, case in BROKEN_CASES.items():
        config, runtime = begin(folder, name, case)
        with broken(name):
            metrics = train_one_step(config, runtime)
        if runtime.is_main:
            torch.save(metrics, folder / f"{name}.pt")
        dist.barrier()
    runtimes.stop()


def begin(folder, name, case):
    """(config, runtime): the process groups of the first case, or new groups in the same processes."""
    from megatron.core import parallel_state
    from te_cases import config_of, objective_of

    from megatron_laser.distributed import runtime as runtimes

    config = config_of(folder, name, case["family"], [*objective_of(name), *case["settings"]])
    if not parallel_state.is_initialized():
        begin.runtime = runtimes.start(config)
    else:
        parallel_state.destroy_model_parallel()
        begin.runtime = runtimes.build_groups(config, begin.runtime.store)
    return config, begin.runtime


def rehearse(config, runtime):
    """Two steps, a checkpoint, a third step, an export; then the third step again, from the checkpoint."""
    from helpers.rollouts import rollout_batch
    from helpers.runs import SCORE_TOKEN, torch_optimizers
    from te_cases import GROUPS, STEPS, metrics_of

    from megatron_laser.run.export import export_hf
    from megatron_laser.trainer.checkpoint.manager import CheckpointManager
    from megatron_laser.trainer.trainer import Trainer

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
    return {
        "metrics": metrics,
        "again": again,
        "loaded": loaded,
        "trained": trained,
        "again_trained": weights_of(resumed),
        "calls": dict(te_extension.calls),
        "modules": sorted({type(m).__name__ for m in trainer.policy.chunks.models[0].modules()}),
        "optimizer": type(torch_optimizers(trainer)[0]).__module__,
    }


def train_one_step(config, runtime):
    from helpers.rollouts import rollout_batch
    from helpers.runs import SCORE_TOKEN
    from te_cases import GROUPS, metrics_of

    from megatron_laser.trainer.trainer import Trainer

    trainer = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
    return metrics_of(trainer.train_step(rollout_batch(GROUPS, seed=1), 1))


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.weight_stream()}


if __name__ == "__main__":
    run_worker(main)

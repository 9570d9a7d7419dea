"""Trains, saves and resumes under a list of layouts; for test_checkpoint_layouts.py.

    checkpoint_layouts_worker.py FOLDER PLAN.json OUTPUT.json

A plan is a list of {"layout": [overrides], "load": name or null, "save": name or null}: what is loaded has 2 steps
behind it, otherwise 2 steps are trained first; then the state is saved; then step 3 is trained and reported.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.layouts import laid_out
from helpers.torchrun import ROOT, run_worker

from megatron_laser.config import load_config
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer

sys.path.insert(0, str(ROOT / "tools"))
from compare_layouts import COMPARED, fixed_rollouts


def main():
    folder, plan, output = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    runtime, results = None, []
    for entry in plan:
        config = load_config(folder / "config.yaml", entry["layout"])
        runtime = laid_out(config, runtime)
        trainer = Trainer(config, runtime, score_token_id=89)
        experts = config.moe.routing_replay

        def manager(name, config=config, runtime=runtime, trainer=trainer):
            settings = config.checkpoint.model_copy(update={"folder": folder / "checkpoints" / name})
            return CheckpointManager(
                config.model_copy(update={"checkpoint": settings}), runtime, trainer.policy
            )

        if entry["load"]:
            assert manager(entry["load"]).resume()["step"] == 2
        else:
            for step in (1, 2):
                trainer.train_step(fixed_rollouts(step, experts), step)
        if entry["save"]:
            saving = manager(entry["save"])
            saving.save(2, {"cursor": None} if runtime.is_main else None)
            assert saving.wait(), saving.trouble
        assert optimizer_state.get_step(trainer.policy.optimizer) == 2
        metrics = trainer.train_step(fixed_rollouts(3, experts), 3).metrics
        assert_every_parameter_counts_its_own_steps(trainer.policy.optimizer, 3)
        figures = {key: metrics[key] for key in COMPARED}
        figures["checksum"] = sum(float(t.double().abs().sum()) for _, t in trainer.weight_stream())
        results.append(figures)
        dist.barrier()
    if runtime.is_main:
        output.write_text(json.dumps(results))
    runtimes.stop()


def assert_every_parameter_counts_its_own_steps(optimizer, expected):
    counts = [
        state["step"]
        for inner in getattr(optimizer, "chained_optimizers", [optimizer])
        for state in inner.optimizer.state.values()
    ]
    assert counts
    assert len({count.data_ptr() for count in counts}) == len(counts), "parameters share a step tensor"
    assert {float(count) for count in counts} == {float(expected)}


if __name__ == "__main__":
    run_worker(main)

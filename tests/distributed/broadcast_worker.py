"""Two ranks, first as two data-parallel replicas, then as one: arrays, sums and weights reach the right ranks.

Started by test_broadcast.py; exits non-zero when a claim does not hold.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from helpers.models import tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from helpers.torchrun import run_worker
from megatron.core import parallel_state

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.distributed import communicators
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.distributed.broadcast import broadcast_arrays
from megatron_laser.trainer.step_metrics import reduce_sums
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.weight_sync import sync_weights

GROUPS = [
    [Response(40, True), Response(3, False), Response(2, True)],
    [Response(5, False), Response(4, True)],
]
# layout -> (overrides, data_rank, data_size, replica_ranks, reports_rows) of this rank
LAYOUTS = {
    "data 2": lambda rank: ([], rank, 2, (rank,), True),
    "tensor 2": lambda rank: (["parallel.tensor=2"], 0, 1, (0, 1), rank == 0),
    "pipeline 2": lambda rank: (["parallel.pipeline=2"], 0, 1, (0, 1), rank == 1),
}


def check_runtime(runtime, rank, data_rank, data_size, replica, reports):
    assert (runtime.rank, runtime.world_size) == (rank, 2)
    assert (runtime.data_rank, runtime.data_size) == (data_rank, data_size)
    assert runtime.replica_ranks == replica
    assert runtime.is_main == (rank == 0)
    assert runtime.is_replica_leader == (rank == replica[0])
    assert (runtime.leaders_group is not None) == runtime.is_replica_leader
    assert runtime.reports_rows == reports


def check_communicators(layout):
    """Each Megatron group of both ranks under this layout comes up, neighbouring stages included."""
    names = [name for name, _ in communicators.groups()]
    expected = {
        "data 2": ["data", "optimizer"],
        "tensor 2": ["tensor", "model (tensor and pipeline)", "optimizer"],
        "pipeline 2": ["pipeline", "model (tensor and pipeline)", "optimizer", "embedding"],
    }
    assert names == expected[layout], (layout, names)
    communicators.bring_up(30.0, paired_stages=True)


def check_arrays(runtime):
    flat = rollout_batch(GROUPS, seed=4)
    received = FlatBatch.from_arrays(broadcast_arrays(flat.to_arrays() if runtime.is_main else None, runtime))
    for name, array in flat.to_arrays().items():
        other = received.to_arrays()[name]
        assert array.dtype == other.dtype and np.array_equal(array, other, equal_nan=array.dtype.kind == "f")
    odd = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7, np.int64),
        "special": np.array([np.nan, np.inf, -0.0]),
        "large": np.arange(300_000, dtype=np.int32),
        "text": np.array(["ä", "score"]),
    }
    received = broadcast_arrays(odd if runtime.is_main else {"ignored": np.zeros(1)}, runtime)
    assert list(received) == list(odd)
    for name, array in odd.items():
        assert received[name].dtype == array.dtype and received[name].tobytes() == array.tobytes()
    if runtime.is_main:
        try:
            broadcast_arrays({"object": np.array([{}, None], dtype=object)}, runtime)
        except ValueError:
            pass
        else:
            raise AssertionError("an object array was pickled")


def check_sums(runtime):
    value = torch.tensor(float(runtime.rank + 1), dtype=torch.float64)
    totals = reduce_sums(
        [{"policy_loss": value, "max_mismatch": value}, {"policy_loss": value}],
        contributes=runtime.reports_rows,
        group=runtime.cpu_group,
    )
    reporting = [None, None]
    dist.all_gather_object(reporting, runtime.reports_rows)
    contributions = [rank + 1 for rank in range(2) if reporting[rank]]
    assert totals["policy_loss"] == 2 * sum(contributions)
    assert totals["max_mismatch"] == max(contributions)


class Engine:
    """Keeps the weights that it is sent."""

    def __init__(self):
        self.version, self.weights = 0, {}

    def update_weights(self, weights, version):
        self.weights = {name: tensor.clone() for name, tensor in weights}
        self.version = version


def check_training(config, runtime):
    """One rank has one long sample, the other several short ones; all agree on what was learned."""
    trainer = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
    result = trainer.train_step(rollout_batch(GROUPS, seed=4), 1)
    # Of what the stage before sent, nothing is kept until the next step.
    assert all(model.decoder.input_tensor is None for model in trainer.policy.chunks.models)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, (result.metrics, result.scores.tolist(), result.advantages.tolist()))
    assert str(everywhere[0]) == str(everywhere[1])
    engine = Engine() if runtime.is_main else None
    sync_weights(trainer.weight_stream(), engine, version=1)
    if engine is None:
        return result.metrics, None
    assert engine.version == 1
    initial = dict(tiny_model("qwen2-tied").named_parameters())
    assert set(engine.weights) == set(initial)
    assert all(engine.weights[name].shape == tensor.shape for name, tensor in initial.items())
    assert all(not torch.equal(engine.weights[name], tensor) for name, tensor in initial.items())
    return result.metrics, engine.weights


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    runtime, store, first = None, None, None
    for layout, facts in LAYOUTS.items():
        overrides, *expected = facts(rank)
        config = run_config(
            folder / f"rank-{rank}",
            folder / "model",
            "laser.reasoning_warmup_steps=0",
            "laser.self_reward_warmup_steps=0",
            "batching.tokens_per_micro_batch=128",
            "optimizer.lr=1.0e-4",
            *overrides,
        )
        if store is None:
            runtime = runtimes.start(config)
            store = runtime.store
        else:
            parallel_state.destroy_model_parallel()
            runtime = runtimes.build_groups(config, store)
        check_runtime(runtime, rank, *expected)
        check_communicators(layout)
        check_arrays(runtime)
        check_sums(runtime)
        metrics, weights = check_training(config, runtime)
        first = first or (metrics, weights)
        for name in ("policy_loss", "self_reward_loss", "grad_norm", "entropy"):
            assert abs(metrics[name] - first[0][name]) <= 1e-5 * abs(first[0][name]) + 1e-7, (layout, name)
        if weights is not None:
            assert all((weights[name] - first[1][name]).abs().max() < 1e-6 for name in weights), layout
        dist.barrier()
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)

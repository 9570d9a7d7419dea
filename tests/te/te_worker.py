"""Trains, saves, resumes and exports with layers of Transformer Engine, one case after the other; for test_te.py.

te_worker.py SOURCES FOLDER GROUP
"""

import inspect
import sys
from pathlib import Path
from unittest import mock

import te_extension
from helpers.torchrun import run_worker
from te_boot import boot


def main():
    sources, folder, group = sys.argv[1:]
    boot(Path(sources))

    import torch
    import torch.distributed as dist
    from te_breaks import spoil_unread_gradients
    from te_cases import GROUPS_OF_CASES

    from megatron_laser.distributed import runtime as runtimes

    torch.set_num_threads(1)
    spoil_unread_gradients()
    record_rings()
    permute_in_torch()
    for name in GROUPS_OF_CASES[group]:
        result, runtime = outcome(Path(folder), name)
        if runtime.is_main:
            torch.save(result, f"{folder}/{name}.pt")
        dist.barrier()
    runtimes.stop()


def outcome(folder, name):
    """(what the case of this name gives, the runtime)."""
    import torch.distributed as dist
    from te_breaks import broken
    from te_cases import BROKEN_CASES, CASES, REFUSED, RING
    from te_ring import extremes

    if name in CASES:
        config, runtime = begin(folder, name, CASES[name])
        return rehearse(config, runtime), runtime
    if name in BROKEN_CASES:
        config, runtime = begin(folder, name, BROKEN_CASES[name])
        with broken(name):
            return train_one_step(config, runtime), runtime
    if name == RING:
        config, runtime = begin(folder, name, CASES["bf16-context"])
        return extremes([dist.group.WORLD]), runtime
    what = name.removeprefix("refused-")
    if what in REFUSED:
        config, runtime = begin(folder, name, CASES["bf16-context"], f"model.attention={what}")
        return refusal(config), runtime
    config, runtime = begin(folder, name, CASES["bf16"], f"model.fp8={what}", "batching.pad_multiple=64")
    return refusal_before_hopper(config), runtime


def begin(folder, name, case, *settings):
    """(config, runtime): the process groups of the first case, or new groups in the same processes."""
    from megatron.core import parallel_state
    from te_cases import config_of, objective_of

    from megatron_laser.distributed import runtime as runtimes

    config = config_of(folder, name, case["family"], [*objective_of(case), *case["settings"], *settings])
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
    from megatron_laser.run.stop_signals import StopSignals
    from megatron_laser.trainer.checkpoint.manager import CheckpointManager
    from megatron_laser.trainer.trainer import Trainer

    te_extension.calls.clear()
    rings.clear()
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
    weights = trainer.weight_stream()
    export_hf(config, weights, StopSignals(), is_main=runtime.is_main, step=config.run.steps)

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
        "rings": list(rings),
        "modules": sorted({type(m).__name__ for m in trainer.policy.chunks.models[0].modules()}),
        "optimizer": type(torch_optimizers(trainer)[0]).__module__,
        "state": state_of(trainer),
    }


def state_of(trainer):
    """(bytes on the device, {kind: dtype}) of the optimizer's state between two steps."""
    from helpers.runs import torch_optimizers

    found = {}
    for optimizer in torch_optimizers(trainer):
        for state in optimizer.state.values():
            found |= {name: value for name, value in state.items() if value.dim()}
    there = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    return there, {name: str(tensor.dtype) for name, tensor in found.items()}


rings: list[dict] = []


def record_rings():
    """Keep what arrives where Transformer Engine's attention turns to context parallelism."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel

    names = inspect.signature(context_parallel.attn_forward_func_with_cp)

    def entry(*args, **kwargs):
        given = names.bind(*args, **kwargs)
        given.apply_defaults()
        rings.append(
            {
                **{
                    n: v
                    for n, v in given.arguments.items()
                    if isinstance(v, (bool, int, float, str, list, tuple))
                },
                "tokens": given.arguments["q"].shape[0],
                "bounds": given.arguments["cu_seqlens_q"].tolist(),
                "one_set_of_bounds": len({id(v) for n, v in given.arguments.items() if n.startswith("cu_")})
                == 1,
                "group": given.arguments["cp_group"].size(),
            }
        )
        return context_parallel.attn_forward_func_with_cp(*args, **kwargs)

    backends.attn_forward_func_with_cp = entry


def permute_in_torch():
    """Tokens are put in the order of their experts by Megatron's own indexing.

    Transformer Engine's kernels for that are Triton's, which would want a device to be tuned on.
    """
    from megatron_laser.trainer import policy

    original = policy.transformer_config

    def unfused(*args, **kwargs):
        config = original(*args, **kwargs)
        config.moe_permute_fusion = False
        return config

    policy.transformer_config = unfused


def train_one_step(config, runtime):
    from helpers.rollouts import rollout_batch
    from helpers.runs import SCORE_TOKEN
    from te_cases import GROUPS, metrics_of

    from megatron_laser.trainer.trainer import Trainer

    trainer = Trainer(config, runtime, score_token_id=SCORE_TOKEN)
    return metrics_of(trainer.train_step(rollout_batch(GROUPS, seed=1), 1))


def refusal(config):
    """What building a policy says where cuDNN has no kernel for it."""
    no = te_extension.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no such kernel"
    with mock.patch.object(te_extension, "get_fused_attn_backend", lambda parameters: no):
        return refused(config)


def refusal_before_hopper(config):
    """What building a policy says on an A100. What Transformer Engine found out before it has kept."""
    from transformer_engine.pytorch import quantization, utils

    with (
        mock.patch.object(quantization, "get_device_compute_capability", lambda: (8, 0)),
        mock.patch.object(utils, "get_device_compute_capability", lambda: (8, 0)),
        mock.patch.object(quantization, "_FP8_SUPPORT", None),
        mock.patch.object(quantization, "_FP8_BLOCK_SCALING_SUPPORT", None),
    ):
        return refused(config)


def refused(config):
    """The error of a build that must not come to reading a weight, which would be another one."""
    from megatron_laser.errors import ConfigError
    from megatron_laser.trainer import policy

    unread = AssertionError("weights were read")
    with mock.patch.object(policy, "load_weights", side_effect=unread):
        try:
            policy.build_policy(config)
        except ConfigError as error:
            return str(error)
    raise AssertionError("was not refused")


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.weight_stream()}


if __name__ == "__main__":
    run_worker(main)

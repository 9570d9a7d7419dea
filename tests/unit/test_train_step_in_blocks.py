"""A whole train step with the loss inside blocks of rows equals the one of two passes."""

import dataclasses

import pytest
import torch

from megatron_laser.model import platform

platform.install()

from megatron_laser.benchmarks.step import _CONFIG, StepBenchmark  # noqa: E402
from megatron_laser.config import load_config  # noqa: E402
from megatron_laser.distributed import runtime as runtimes  # noqa: E402
from megatron_laser.ops import configure, passes  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

SHAPE = dict(prompts=2, samples=4, response_length=24, hidden=32, layers=1, vocabulary=320)
SETTINGS = {
    "plain": [],
    "clip": ["policy.minibatches=2", "policy.epochs=2", "policy.clip_low=0.01", "policy.clip_high=0.01"],
    "importance": ["policy.importance_cap=2.0", "policy.dual_clip=3.0"],
    "entropy and KL": ["policy.entropy_coefficient=0.01", "policy.kl_coefficient=0.1"],
}


@pytest.fixture(autouse=True)
def settings():
    before = configure(min_block_rows=8)
    yield
    configure(**dataclasses.asdict(before))
    runtimes.stop()


def trained(folder, overrides, gib, monkeypatch):
    """(metrics of two steps, weights after them, how many micro-batches went through blocks)."""
    benchmark, blocks = StepBenchmark(**SHAPE), []
    apply = passes.LossInBlocks.apply
    monkeypatch.setattr(passes.LossInBlocks, "apply", lambda *args: blocks.append(args[-1]) or apply(*args))
    torch.manual_seed(0)
    benchmark.save_model(folder)
    shape = {key: SHAPE[key] for key in ("prompts", "samples", "response_length")}
    (folder / "run.yaml").write_text(_CONFIG.format(model=folder, budget=4096, **shape))
    config = load_config(folder / "run.yaml", [*overrides, f"model.keep_logits_gib={gib}"])
    trainer = Trainer(config, runtimes.start(config), score_token_id=2)
    flat = benchmark.rollouts()
    metrics = [trainer.train_step(flat, step).metrics for step in (1, 2)]
    weights = [p.detach().clone() for p in trainer.policy.chunks.wrapped[0].parameters()]
    monkeypatch.undo()
    return metrics, weights, blocks


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_inside_blocks_trains_the_same(tmp_path, monkeypatch, overrides):
    results = []
    for name, gib in (("whole", 1), ("blocks", 64 * 320 * 4 / 2**30)):
        (tmp_path / name).mkdir()
        configure(min_block_rows=8)
        results.append(trained(tmp_path / name, overrides, gib, monkeypatch))
        runtimes.stop()
    (whole, weights, none), (parts, others, blocks) = results
    assert not none and blocks and all(len(one) > 1 for one in blocks)
    for one, other in zip(whole, parts):
        assert one.keys() == other.keys()
        for key in one:
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5, nan_ok=True), key
    for one, other in zip(weights, others):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)

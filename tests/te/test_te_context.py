"""Transformer Engine's context parallelism on four ranks: its real ring over gloo, its kernels stand-ins.

On two ranks, which run always: test_te.py.
"""

from pathlib import Path

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import rollout_batch
from helpers.runs import SCORE_TOKEN
from helpers.torchrun import torchrun
from te_cases import FOUR_RANK_CASES, GROUPS, config_of, metrics_of, objective_of
from te_sources import VERSION, transformer_engine_sources

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.long]

WORKER = Path(__file__).with_name("te_context_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the four ranks saved, and their model."""
    try:
        sources = transformer_engine_sources()
    except LookupError as error:
        pytest.skip(f"no Transformer Engine {VERSION} from pip: {error}")
    folder = tmp_path_factory.mktemp("te_context")
    save_tiny_model(folder / "qwen3", "qwen3")
    torchrun(WORKER, 4, sources, folder)
    return folder


def test_the_ring_over_our_order_of_tokens_is_attention_over_whole_sequences(folder):
    errors = torch.load(folder / "ring.pt")
    assert [ours for ours, _ in errors["most"]] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert min(other for _, other in errors["least"]) > 1e-2


@pytest.mark.parametrize("name", FOUR_RANK_CASES)
def test_a_step_with_tensor_parallelism_beside_it_is_that_of_one_process(name, folder, single_process):
    from megatron_laser.trainer.trainer import Trainer

    config = config_of(folder, "local", "qwen3", objective_of(FOUR_RANK_CASES[name]), layers="torch")
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    expected = metrics_of(trainer.train_step(rollout_batch(GROUPS, seed=1), 1))
    result = torch.load(folder / f"{name}.pt")
    tolerance = {"rel": 0.01, "abs": 1e-3} if name.startswith("bf16") else {"rel": 1e-5, "abs": 1e-7}
    assert result["metrics"] == pytest.approx(expected, **tolerance)
    assert bool(result["rings"]) == name.startswith("bf16")
    assert all(ring["cp_global_ranks"] == [0, 2] for ring in result["rings"])

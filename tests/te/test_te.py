"""The trainer on Transformer Engine's layers, rehearsed without a GPU: see te_boot.py for what is real and what is not.

Every case trains on two gloo ranks with layers of Transformer Engine and is compared with one process and torch's
layers: losses, gradient norms and all weights.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import rollout_batch
from helpers.runs import SCORE_TOKEN
from helpers.torchrun import torchrun
from te_cases import CASES, GROUPS, STEPS, config_of, metrics_of
from te_sources import VERSION, transformer_engine_sources

from megatron_laser.model.hf_folder import HfFolder

# long: written on a machine too busy to prove all cases; te_worker.py is proven on one process in fp32 only.
pytestmark = [pytest.mark.distributed, pytest.mark.long]

WORKER = Path(__file__).with_name("te_worker.py")
FP32 = [name for name in CASES if not name.startswith("bf16")]
BF16 = [name for name in CASES if name.startswith("bf16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    for family in {case["family"] for case in CASES.values()}:
        save_tiny_model(folder / family, family)
    return folder


@pytest.fixture(scope="module")
def rehearsed(folder):
    """Case to what the worker saved."""
    try:
        sources = transformer_engine_sources()
    except LookupError as error:
        pytest.skip(f"no Transformer Engine {VERSION} from pip: {error}")
    plan = folder / "plan.json"
    plan.write_text(json.dumps(CASES))
    torchrun(WORKER, 2, sources, folder, plan, timeout=240)
    return {name: torch.load(folder / f"{name}.pt") for name in CASES}


@pytest.fixture(scope="module")
def local(folder, single_process):
    """A case's name to (metrics, weights) of torch's layers on one process."""
    from megatron_laser.trainer.trainer import Trainer

    results = {}

    def train(name):
        case = CASES[name]
        dtype = [setting for setting in case["settings"] if setting.startswith("model.dtype")]
        key = (case["family"], *dtype)
        if key not in results:
            one = {"family": case["family"], "settings": dtype}
            config = config_of(folder, one, "local", layers="torch")
            trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
            metrics = [
                metrics_of(trainer.train_step(rollout_batch(GROUPS, seed=step), step))
                for step in range(1, STEPS + 1)
            ]
            results[key] = metrics, {n: t.clone() for n, t in trainer.weight_stream()}
        return results[key]

    return train


@pytest.mark.parametrize("name", FP32)
def test_losses_norms_and_weights_are_those_of_torchs_layers(name, rehearsed, local):
    metrics, weights = local(name)
    result = rehearsed[name]
    for step, (mine, theirs) in enumerate(zip(result["metrics"], metrics, strict=True), 1):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7), f"step {step}"
    assert result["trained"].keys() == weights.keys()
    for key, tensor in weights.items():
        worst = float((result["trained"][key] - tensor).abs().max())
        assert worst <= 1e-5, f"{key}: {worst}"


@pytest.mark.parametrize("name", BF16)
def test_bf16_goes_through_transformer_engines_attention_and_stays_near(name, rehearsed, local):
    metrics, _ = local(name)
    result = rehearsed[name]
    assert result["calls"]["fused_attn_fwd"] and result["calls"]["fused_attn_bwd"]
    for mine, theirs in zip(result["metrics"], metrics, strict=True):
        for key in ("total_loss", "policy_loss", "self_reward_loss", "entropy", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=0.05, abs=0.02), key


@pytest.mark.parametrize("name", list(CASES))
def test_layers_optimizer_and_clipping_are_transformer_engines(name, rehearsed):
    result = rehearsed[name]
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(result["modules"])
    assert result["optimizer"].startswith("transformer_engine.")
    used = {"generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "fused_rope_forward", "fused_rope_backward"}
    assert used | {"multi_tensor_adam", "multi_tensor_l2norm"} <= result["calls"].keys()


@pytest.mark.parametrize("name", list(CASES))
def test_a_resumed_run_repeats_the_step_bit_for_bit(name, rehearsed):
    result = rehearsed[name]
    assert result["again"] == result["metrics"][-1]
    for key, tensor in result["trained"].items():
        assert torch.equal(result["again_trained"][key], tensor), key


@pytest.mark.parametrize("name", list(CASES))
def test_what_was_loaded_is_exported_bit_for_bit(name, rehearsed, folder):
    result = rehearsed[name]
    with HfFolder(folder / CASES[name]["family"]) as source:
        assert source.names() and set(result["loaded"]) <= set(source.names())
        for key, tensor in result["loaded"].items():
            assert torch.equal(tensor, source.full(key).to(tensor.dtype)), key
    with HfFolder(folder / name / "hf") as exported:
        for key, tensor in result["trained"].items():
            assert torch.equal(exported.full(key), tensor), key

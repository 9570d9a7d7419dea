"""The trainer on Transformer Engine's layers, rehearsed without a GPU: see te_boot.py for what is real and what is not.

Every case trains on two gloo ranks with layers of Transformer Engine and is compared with one process and torch's
layers in fp32: losses, gradient norms and all weights. One case of each kind runs always, the others are `long`.
"""

import math
from pathlib import Path

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import rollout_batch
from helpers.runs import SCORE_TOKEN
from helpers.torchrun import ROOT, torchrun
from te_cases import (
    BF16_CASES,
    BROKEN_CASES,
    CASES,
    CORE_CASES,
    FP8_CASES,
    FP32_CASES,
    GROUPS,
    GROUPS_OF_CASES,
    MOMENTS,
    REFUSED,
    REFUSED_RECIPES,
    RING,
    STEPS,
    config_of,
    metrics_of,
    objective_of,
)
from te_sources import VERSION, transformer_engine_sources

from megatron_laser.model.hf_folder import HfFolder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("te_worker.py")


def by_case(names):
    """Parametrizes a test by cases."""
    marks = {True: (), False: pytest.mark.long}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name in CORE_CASES]) for name in names]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    for family in {case["family"] for case in CASES.values()}:
        save_tiny_model(folder / family, family)
    return folder


class Rehearsed:
    """Case to what the worker saved. It is started for each group of cases when one of them is first asked for."""

    def __init__(self, sources, folder):
        self._sources, self._folder, self._found = sources, folder, {}

    def __getitem__(self, name):
        if name not in self._found:
            (group,) = (group for group, names in GROUPS_OF_CASES.items() if name in names)
            names = GROUPS_OF_CASES[group]
            self._found |= dict.fromkeys(names)  # not again, if it fails
            torchrun(WORKER, 2, self._sources, self._folder, group, timeout=280)
            self._found |= {each: torch.load(self._folder / f"{each}.pt") for each in names}
        assert self._found[name] is not None, "the worker of this group of cases failed, see an earlier test"
        return self._found[name]


@pytest.fixture(scope="module")
def rehearsed(folder):
    try:
        sources = transformer_engine_sources()
    except LookupError as error:
        pytest.skip(f"no Transformer Engine {VERSION} from pip: {error}")
    return Rehearsed(sources, folder)


@pytest.fixture(scope="module")
def local(folder, single_process):
    """A case's name to (metrics, weights) of torch's layers on one process, in fp32."""
    from megatron_laser.trainer.trainer import Trainer

    results = {}

    def train(name):
        case = (CASES | BROKEN_CASES)[name]
        family, objective = case["family"], objective_of(case)
        key = (family, *objective)
        if key not in results:
            config = config_of(folder, "local", family, objective, layers="torch")
            trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
            metrics = [
                metrics_of(trainer.train_step(rollout_batch(GROUPS, seed=step), step))
                for step in range(1, STEPS + 1)
            ]
            results[key] = metrics, {n: t.clone() for n, t in trainer.weight_stream()}
        return results[key]

    return train


def differing(mine, theirs):
    """The figures of one step that do not agree in fp32."""
    assert mine.keys() == theirs.keys()
    return {key for key, value in theirs.items() if mine[key] != pytest.approx(value, rel=1e-5, abs=1e-7)}


@by_case(FP32_CASES)
def test_losses_norms_and_weights_are_those_of_torchs_layers(name, rehearsed, local):
    metrics, weights = local(name)
    result = rehearsed[name]
    for step, (mine, theirs) in enumerate(zip(result["metrics"], metrics, strict=True), 1):
        assert not differing(mine, theirs), f"step {step}: {mine}, not {theirs}"
    assert result["trained"].keys() == weights.keys()
    for key, tensor in weights.items():
        worst = float((result["trained"][key] - tensor).abs().max())
        assert worst <= 1e-5, f"{key}: {worst}"
    assert not any("fused_attn" in name for name in result["calls"])


@by_case(BROKEN_CASES)
def test_a_fault_in_the_gradients_changes_their_norm(name, rehearsed, local):
    metrics, _ = local(name)
    mine = rehearsed[name]
    if finds := BROKEN_CASES[name].get("finds"):
        assert finds <= differing(mine, metrics[0])
        return
    # A step with NaN in a gradient is skipped, and has no figures.
    expected = {"grad_norm"} if math.isfinite(mine["grad_norm"]) else set(mine)
    assert differing(mine, metrics[0]) == expected


@by_case(BF16_CASES)
def test_bf16_goes_through_transformer_engines_attention_and_stays_near(name, rehearsed, local):
    metrics, weights = local(name)
    result = rehearsed[name]
    assert result["calls"]["fused_attn_fwd"] and result["calls"]["fused_attn_bwd"]
    for mine, theirs in zip(result["metrics"], metrics, strict=True):
        for key, value in theirs.items():
            tolerance = 0.05 if key == "kl_loss" else 0.01
            assert mine[key] == pytest.approx(value, rel=tolerance, abs=1e-3), key
    # bf16 rounds a norm's weight, near 1, to steps larger than these updates.
    for key, tensor in weights.items():
        if tensor.dim() == 2:
            start = result["loaded"][key].float()
            change, expected = (trained - start for trained in (result["trained"][key].float(), tensor))
            assert torch.cosine_similarity(change.flatten(), expected.flatten(), dim=0) > 0.97, key


@by_case(FP8_CASES)
def test_all_of_a_layers_products_are_in_fp8_and_figures_stay_near(name, rehearsed, local):
    metrics, weights = local(name)
    result = rehearsed[name]
    experts = "experts" in name
    kinds = {kind for kind in result["calls"] if kind.startswith("generic_gemm of ")}
    if experts:  # the router's own; experts' products are told apart, those of a second run among them
        kinds -= {"generic_gemm of Parameter and Tensor", "generic_gemm of Tensor"}
        kinds |= {kind for kind in result["calls"] if kind.startswith("grouped gemm of ")}
        assert any(kind.startswith("grouped") for kind in kinds)
    wanted = "Float8Blockwise" if "blockwise" in name else "Float8Tensor"
    assert kinds and all(
        part.startswith(wanted) for kind in kinds for part in kind.partition(" of ")[2].split(" and ")
    )
    # Rounded inputs send some tokens to other experts.
    limits = {"self_reward_loss": 0.2 if experts else 0.1, "entropy": 0.005, "grad_norm": 0.1}  # relative
    for mine, theirs in zip(result["metrics"], metrics, strict=True):
        for key, tolerance in limits.items():
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), key
    for key, tensor in weights.items():
        if tensor.dim() == 2 and not (experts and ".mlp." in key):
            start = result["loaded"][key].float()
            change, expected = (trained - start for trained in (result["trained"][key].float(), tensor))
            assert torch.cosine_similarity(change.flatten(), expected.flatten(), dim=0) > 0.85, key


@pytest.mark.parametrize("recipe", REFUSED_RECIPES)
def test_fp8_before_hopper_is_refused_before_weights_are_read(recipe, rehearsed):
    message = rehearsed[f"refused-{recipe}"]
    assert f"model.fp8: {recipe} cannot run on this GPU" in message and "model.fp8 to none" in message
    assert "compute capability" in message


@by_case(CASES)
def test_layers_optimizer_and_clipping_are_transformer_engines(name, rehearsed):
    result = rehearsed[name]
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(result["modules"])
    assert result["optimizer"].startswith("transformer_engine.")
    assert bool(result["rings"]) == (name == "bf16-context")
    used = {"generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "fused_rope_forward", "fused_rope_backward"}
    assert used | {"multi_tensor_adam", "multi_tensor_l2norm"} <= result["calls"].keys()


@by_case(CASES)
def test_the_optimizers_state_is_kept_as_set_and_where_set(name, rehearsed):
    there, dtypes = rehearsed[name]["state"]
    settings = CASES[name]["settings"]
    if MOMENTS in settings:
        assert dtypes == dict(
            exp_avg="torch.bfloat16", exp_avg_sq="torch.bfloat16", master_param="torch.float32"
        )
    else:
        assert dtypes == dict(exp_avg="torch.float32", exp_avg_sq="torch.float32")
    assert (there == 0) == ("optimizer.offload=true" in settings)


@by_case([name for name in CASES if name.startswith("experts")])
def test_experts_are_grouped_products_of_transformer_engine(name, rehearsed):
    result = rehearsed[name]
    assert {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"} <= set(
        result["modules"]
    )
    assert result["calls"]["te_general_grouped_gemm"]


def test_what_arrives_at_transformer_engines_ring(rehearsed):
    rings = rehearsed["bf16-context"]["rings"]
    assert any(ring["is_training"] for ring in rings)
    for ring in rings:
        settings = {"qkv_format": "thd", "attn_mask_type": "padding_causal", "cp_comm_type": "p2p"}
        settings |= {"use_fused_attention": True, "window_size": (-1, 0), "dropout_p": 0.0, "fp8": False}
        # Lengths with their padding, once, for all: no kernel has tokens to step over, and nobody asks the device.
        settings |= {
            "pad_between_seqs": False,
            "one_set_of_bounds": True,
            "group": 2,
            "cp_global_ranks": [0, 1],
        }
        assert {name: ring[name] for name in settings} == settings
        bounds = torch.tensor(ring["bounds"])
        assert ring["max_seqlen_q"] == ring["max_seqlen_kv"] == int(bounds.diff().max())
        assert not bool((bounds.diff() % 4).any()) and int(bounds[-1]) == 2 * ring["tokens"]
    assert max(ring["tokens"] for ring in rings) <= 40
    assert max(len(ring["bounds"]) for ring in rings) > 2


def test_the_ring_over_our_order_of_tokens_is_attention_over_whole_sequences(rehearsed):
    """On two ranks; on four, and with tensor parallelism beside it: test_te_context.py."""
    errors = rehearsed[RING]
    assert [ours for ours, _ in errors["most"]] == pytest.approx([0.0], abs=1e-12)
    assert min(other for _, other in errors["least"]) > 1e-2


@pytest.mark.parametrize("attention", REFUSED)
def test_attention_without_a_kernel_is_refused_before_weights_are_read(attention, rehearsed):
    message = rehearsed[f"refused-{attention}"]
    assert f"model.attention: {attention} with parallel.context 2" in message
    assert "Transformer Engine 2.20.2" in message and "head_dim 32" in message and "NVTE_DEBUG=1" in message


@by_case(CASES)
def test_a_resumed_run_repeats_the_step_bit_for_bit(name, rehearsed):
    result = rehearsed[name]
    assert result["again"] == result["metrics"][-1]
    assert result["again_trained"].keys() == result["trained"].keys()
    for key, tensor in result["trained"].items():
        assert torch.equal(result["again_trained"][key], tensor), key


@by_case(CASES)
def test_what_was_loaded_is_exported_bit_for_bit(name, rehearsed, folder):
    result = rehearsed[name]
    with HfFolder(folder / CASES[name]["family"]) as source:
        assert source.names() and set(result["loaded"]) == set(source.names())
        for key, tensor in result["loaded"].items():
            assert torch.equal(tensor, source.full(key).to(tensor.dtype)), key
    with HfFolder(folder / name / "hf") as exported:
        assert set(exported.names()) == set(result["trained"])
        for key, tensor in result["trained"].items():
            assert torch.equal(exported.full(key), tensor), key


def test_what_is_rehearsed_is_what_gpus_get():
    requirements = (ROOT / "tools" / "gpu" / "requirements.txt").read_text()
    assert f"=={VERSION}" in requirements.partition("transformer-engine")[2].splitlines()[0]


def test_without_an_index_the_reason_is_pips(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    with pytest.raises(LookupError, match="No matching distribution found for transformer_engine"):
        transformer_engine_sources(cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

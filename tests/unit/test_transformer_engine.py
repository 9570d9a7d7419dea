"""Transformer Engine: a GPU never falls back silently, and every way in which it can be unusable has its own words."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_config
from helpers.source_tree import ROOT

from megatron_laser.config import ConfigError
from megatron_laser.model import platform

platform.install()

from megatron.core.extensions import transformer_engine as megatron_extension  # noqa: E402
from megatron.core.tensor_parallel import RowParallelLinear  # noqa: E402

from megatron_laser.model import gradient_fusion, policy_model, transformer_engine  # noqa: E402
from megatron_laser.model.gradient_fusion import fuses_gradient_accumulation  # noqa: E402
from megatron_laser.model.hf_config import transformer_config  # noqa: E402
from megatron_laser.model.torch_layers import PackedSdpaAttention  # noqa: E402
from megatron_laser.model.transformer_engine import (  # noqa: E402
    backend_variable_problems,
    ring_in_pairs,
    settle,
    use_transformer_engine,
)

GOOD = '__version__ = "2.20.2"\n'


def forget():
    transformer_engine._problem.cache_clear()
    transformer_engine._import_error.cache_clear()
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(platform, "has_cuda", lambda: True)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package `transformer_engine` of the given source texts importable."""

    def write(top=GOOD, pytorch="", known=True):
        folder = tmp_path / "transformer_engine"
        (folder / "pytorch").mkdir(parents=True)
        (folder / "__init__.py").write_text(top)
        (folder / "pytorch" / "__init__.py").write_text(pytorch)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(megatron_extension, "HAVE_TE", known)

    forget()
    yield write
    forget()


def refusal(layers="auto"):
    with pytest.raises(ConfigError) as caught:
        use_transformer_engine(layers)
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.layers: {layers} needs Transformer Engine")
    assert "model.layers: torch" in problem
    return problem


def test_layers_are_torchs_on_a_cpu_and_wherever_they_are_asked_for(install, monkeypatch):
    install()
    monkeypatch.setattr(platform, "has_cuda", lambda: False)
    assert not use_transformer_engine("auto")
    assert use_transformer_engine("transformer_engine")
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    assert not use_transformer_engine("torch")
    assert use_transformer_engine("auto")


def test_a_gpu_without_transformer_engine_is_refused(install, on_cuda):
    assert "is not installed" in refusal()


@pytest.mark.parametrize(
    ("top", "pytorch"),
    [
        (GOOD, "raise ImportError('undefined symbol: _ZN2at4_ops')"),
        (GOOD, "raise OSError('libcudnn_graph.so.9: cannot open\\n  shared object file')"),
        (GOOD, "raise AssertionError('found empty meta package')"),
        ("import a_library_that_it_needs", ""),
    ],
    ids=["ImportError", "OSError", "AssertionError", "a missing dependency"],
)
def test_one_that_fails_to_import_is_refused_with_the_reason(install, on_cuda, top, pytorch):
    install(top, pytorch)
    problem = refusal()
    assert "installed but fails to import" in problem and torch.__version__ in problem
    reason = problem.partition("fails to import: ")[2]
    assert reason.startswith(
        (
            "ImportError: undefined symbol: _ZN2at4_ops",
            "OSError: libcudnn_graph.so.9: cannot open shared object file",
            "AssertionError: found empty meta package",
            "ModuleNotFoundError: No module named 'a_library_that_it_needs'",
        )
    )


@pytest.mark.parametrize("version", ["1.13.0", "2.4.0+0fd7b7f"])
def test_one_that_is_too_old_is_refused_with_both_versions(install, on_cuda, version):
    install(f"__version__ = {version!r}")
    problem = refusal("transformer_engine")
    assert version in problem and "2.8" in problem and "2.20" in problem


def test_one_that_megatron_does_not_take_is_refused(install, on_cuda):
    install(known=False)
    assert "Megatron-Core finds 2.20.2 unusable" in refusal()


def test_another_release_than_the_rehearsed_one_is_said(install, on_cuda, caplog):
    install('__version__ = "2.14.0"')
    assert use_transformer_engine("auto")
    assert "2.14.0 was not rehearsed" in caplog.text and "2.20" in caplog.text


def test_a_broken_one_that_is_not_wanted_is_hidden_from_megatron(install, on_cuda):
    install(pytorch="raise OSError('libcudnn')")
    for _ in range(2):
        settle("torch")
        with pytest.raises(ImportError):
            import transformer_engine  # noqa: F401
    with pytest.raises(ConfigError, match="libcudnn"):
        settle("auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["convert", "/nonexistent", "/x"], "neither a checkpoint"),
        pytest.param(["replay", "/nonexistent"], "no batch.npz", marks=pytest.mark.long),
    ],
)
def test_a_broken_one_does_not_stop_commands_that_compute_without_it(tmp_path, command, says):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libcudart')")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_laser", *command],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and says in done.stderr, done.stderr


def test_variables_that_contradict_model_attention_are_named(monkeypatch):
    monkeypatch.setattr(transformer_engine, "_set_for_models", {})
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    assert backend_variable_problems("fused") == []
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    (problem,) = backend_variable_problems("auto")
    assert problem.startswith("model.attention: auto,") and "NVTE_FLASH_ATTN=0" in problem
    assert backend_variable_problems("fused") == []


def test_a_second_model_of_a_process_may_have_another_attention(single_process, monkeypatch):
    monkeypatch.setattr(transformer_engine, "_set_for_models", {})
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)
    hf = tiny_config("qwen2", num_hidden_layers=1)
    for attention in ("auto", "fused", "flash", "auto"):
        assert backend_variable_problems(attention) == []
        config = transformer_config(hf, dtype=torch.bfloat16, attention=attention)
        policy_model.PolicyModel(config, hf, vocab_multiple=1)
        # A choice that is not ours is still a contradiction, whatever was built before.
        with monkeypatch.context() as user:
            user.setenv("NVTE_UNFUSED_ATTN", "1" if attention != "auto" else "0")
            (problem,) = backend_variable_problems(attention)
            assert "NVTE_UNFUSED_ATTN" in problem


@pytest.mark.parametrize("attention", ["auto", "flash", "fused"])
def test_model_attention_becomes_the_variables_that_transformer_engine_reads(
    single_process, monkeypatch, attention
):
    import os

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)
    hf = tiny_config("qwen2")
    config = transformer_config(hf, dtype=torch.bfloat16, attention=attention)
    policy_model.PolicyModel(config, hf, vocab_multiple=1)
    expected = {"auto": "111", "flash": "100", "fused": "010"}[attention]
    assert "".join(os.environ[f"NVTE_{name}_ATTN"] for name in ("FLASH", "FUSED", "UNFUSED")) == expected
    assert backend_variable_problems(attention) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_takes_exact_attention_in_layers_of_transformer_engine(monkeypatch, single_process, dtype):
    class FusedAttention:
        pass

    def spec(**arguments):
        layer = policy_model.get_gpt_layer_local_spec(normalization="RMSNorm", **arguments)
        layer.submodules.self_attention.submodules.core_attention = FusedAttention
        return layer

    monkeypatch.setattr(policy_model, "get_gpt_layer_with_transformer_engine_spec", spec)
    config = transformer_config(tiny_config("qwen3"), dtype=dtype)
    config.transformer_impl = "transformer_engine"
    for layer in policy_model.block_spec(config).layer_specs:
        chosen = layer.submodules.self_attention.submodules.core_attention
        assert chosen is (PackedSdpaAttention if dtype == torch.float32 else FusedAttention)


@pytest.mark.parametrize(
    ("setting", "engine", "apex", "cuda", "fuses"),
    [
        ("auto", True, False, True, True),
        ("auto", False, True, True, True),
        ("auto", False, False, True, False),
        ("auto", True, True, False, False),
        ("on", True, False, False, True),
        ("off", True, True, True, False),
    ],
)
def test_gradient_accumulation_is_fused_where_something_can(monkeypatch, setting, engine, apex, cuda, fuses):
    monkeypatch.setattr(gradient_fusion, "has_apex_extension", lambda: apex)
    monkeypatch.setattr(platform, "has_cuda", lambda: cuda)
    assert fuses_gradient_accumulation(setting, transformer_engine=engine) is fuses


def test_fusion_that_nothing_here_can_do_is_refused(monkeypatch):
    monkeypatch.setattr(gradient_fusion, "has_apex_extension", lambda: False)
    with pytest.raises(ConfigError, match=r"optimizer\.gradient_accumulation_fusion: on needs"):
        fuses_gradient_accumulation("on", transformer_engine=False)


def test_layers_of_transformer_engine_are_told_to_fuse_and_the_output_layer_is_not(
    single_process, monkeypatch
):
    class FusingLinear(RowParallelLinear):
        fuse_wgrad_accumulation = False

    def spec(**arguments):
        layer = policy_model.get_gpt_layer_local_spec(normalization="RMSNorm", **arguments)
        modules = layer.submodules
        modules.input_layernorm = modules.pre_mlp_layernorm = policy_model.RMSNorm
        modules.self_attention.submodules.core_attention = PackedSdpaAttention
        modules.self_attention.submodules.linear_proj = FusingLinear
        return layer

    monkeypatch.setattr(policy_model, "get_gpt_layer_with_transformer_engine_spec", spec)
    monkeypatch.setattr(megatron_extension, "TENorm", policy_model.RMSNorm)
    hf = tiny_config("qwen2")
    config = transformer_config(hf, dtype=torch.bfloat16)
    config.transformer_impl = "transformer_engine"
    for fuse in (True, False):
        model = policy_model.PolicyModel(config, hf, vocab_multiple=1, fuse_gradient_accumulation=fuse)
        linears = [module for module in model.modules() if isinstance(module, FusingLinear)]
        assert len(linears) == hf.num_hidden_layers
        assert all(module.fuse_wgrad_accumulation is fuse for module in linears)
        assert model.output_layer.gradient_accumulation_fusion is False


@pytest.mark.parametrize(
    ("context", "layers", "dtype", "hopper", "blackwell"),
    [
        (1, "transformer_engine", "bfloat16", False, False),
        (2, "transformer_engine", "bfloat16", False, True),
        (4, "transformer_engine", "bfloat16", True, True),
        (4, "transformer_engine", "float32", False, False),
        (4, "torch", "bfloat16", False, False),
    ],
)
def test_only_a_ring_that_exchanges_in_pairs_needs_their_communicators(
    monkeypatch, context, layers, dtype, hopper, blackwell
):
    monkeypatch.setattr(transformer_engine, "use_transformer_engine", lambda layers: layers != "torch")
    monkeypatch.delenv("NVTE_BATCH_MHA_P2P_COMM", raising=False)
    for architecture, expected in (((9, 0), hopper), ((10, 0), blackwell)):
        monkeypatch.setattr(transformer_engine, "capability", lambda device, found=architecture: found)
        assert ring_in_pairs(context, layers, dtype) == expected
    monkeypatch.setenv("NVTE_BATCH_MHA_P2P_COMM", "1")
    assert not ring_in_pairs(context, layers, dtype)

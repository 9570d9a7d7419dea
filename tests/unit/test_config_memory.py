"""The dry run's memory sum: its formula against a count of what autograd keeps, its parts, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.runs import run_config
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config, resolve_plan
from megatron_laser.config.architecture import read_architecture
from megatron_laser.config.memory import GIB, MemorySum, layer_activation_bytes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def plan(world_size: int = 4, *overrides: str, name: str = "qwen2.5_7b"):
    config = load_config(EXAMPLES / name / "laser.yaml", [f"model.path={EXAMPLES / name}", *overrides])
    return resolve_plan(config, world_size)


def line(memory: MemorySum, name: str):
    found = [item for item in memory.lines if item.name == name]
    return found[0] if found else None


def test_a_layers_activations_are_what_autograd_keeps() -> None:
    """A layer written out in torch, with a fused norm's output and rotated queries and keys, counted by hooks."""
    arch = dataclasses.replace(
        read_architecture(EXAMPLES / "qwen2.5_7b"), hidden_size=64, intermediate_size=96
    )
    arch = dataclasses.replace(arch, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    tokens, h, q, k = 256, 64, 64, 32
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.numel() >= tokens * 8:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = [
        torch.nn.Parameter(torch.randn(*shape)) for shape in ((q + 2 * k, h), (h, q), (192, h), (h, 96), (h,))
    ]
    qkv, out, up, down, norm = weights
    x = torch.randn(tokens, h, requires_grad=True)
    angle = torch.rand(tokens, 1, 8)
    cos, sin = angle.cos(), angle.sin()

    class Rotate(torch.autograd.Function):  # keeps nothing of the size of its input, like the fused kernel
        @staticmethod
        def forward(ctx, value):
            first, second = value.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.save_for_backward(value)
            gate, other = value.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * other

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixed = torch.nn.functional.rms_norm(x, (h,), norm) @ qkv.t()
        query, key, value = mixed.split([q, k, k], dim=-1)
        query, key = Rotate.apply(query.view(tokens, 4, 16)), Rotate.apply(key.view(tokens, 2, 16))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None].repeat_interleave(1, dim=1),
            value.view(tokens, 2, 16).transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )
        x = x + attended[0].transpose(0, 1).reshape(tokens, q) @ out.t()
        x + Gated.apply(torch.nn.functional.rms_norm(x, (h,), norm) @ up.t()) @ down.t()
    expected, again = layer_activation_bytes(
        arch, tokens=tokens, itemsize=4, tensor=1, sequence=False, recompute="none"
    )
    assert again == 0
    # grouped queries may be expanded on a CPU, and the norm keeps a number a row
    assert sum(kept.values()) == pytest.approx(expected, rel=0.12)


def test_tensor_and_sequence_split_a_layer_and_recomputation_keeps_less() -> None:
    arch = read_architecture(EXAMPLES / "qwen2.5_7b")

    def kept(**changes):
        settings = dict(tokens=16384, itemsize=2, tensor=4, sequence=True, recompute="none") | changes
        return layer_activation_bytes(arch, **settings)

    whole = kept()[0]
    assert whole == 2 * 16384 * (4 * 3584 + 3 * (3584 + 512) + 3 * 18944) // 4
    assert kept(tensor=1, sequence=False)[0] == 4 * whole
    assert kept(sequence=False)[0] == whole + 2 * 16384 * 3584 * 3
    assert kept(recompute="full") == (2 * 16384 * 3584 // 4, whole - 2 * 16384 * 3584 // 4)
    assert kept(recompute="full")[0] < kept(recompute="mlp")[0] < whole
    assert sum(kept(recompute="mlp")) == whole


def test_the_7b_recipe_fits_80_gb_without_recomputation() -> None:
    memory = plan().memory
    assert line(memory, "activations").bytes == 28 * 2 * 16384 * (4 * 3584 + 3 * 4096 + 3 * 18944) // 4
    assert memory.total == memory.phase_bytes("state") + memory.phase_bytes("update")
    assert 50 * GIB < memory.total < 60 * GIB
    memory.check(79.1 * GIB)


def test_the_first_stage_of_a_pipeline_holds_more_micro_batches() -> None:
    two = line(plan(32, name="qwen2.5_32b").memory, "activations")
    assert "x 2 in flight" in two.detail and "the first stage" in two.detail
    interleaved = line(plan(32, "parallel.virtual_pipeline=2", name="qwen2.5_32b").memory, "activations")
    assert interleaved.bytes == two.bytes * 2.5 / 2


def test_parts_appear_where_a_setting_asks_for_them() -> None:
    plain = plan().memory
    for name, overrides in {
        "kept probabilities": ["model.keep_logits_gib=1"],
        "reference model": ["policy.kl_coefficient=0.01"],
        "in-process engine: cache": ["rollout.engine=in_process", "rollout.max_batch_size=4"],
    }.items():
        assert line(plain, name) is None
        assert line(plan(4, *overrides).memory, name).bytes > 0
    assert line(plain, "save: buffer") is None  # one data-parallel rank gathers nothing
    assert line(plan(8).memory, "save: buffer").bytes == 64 * 2**20
    assert line(plan(4, "rollout.weight_sync=disk").memory, "sync: buckets") is None


def test_colocated_servers_take_the_trainers_place(tmp_path) -> None:
    model = EXAMPLES / "qwen2.5_7b"
    rollout = {"engine": "sglang", "weight_sync": "colocated", "sglang": {"options": {}, "servers": 4}}
    config = run_config(
        tmp_path,
        model,
        rollout=rollout,
        parallel={"tensor": 4},
        model={"path": str(model), "dtype": "bfloat16"},
        laser={"enabled": False},
    )
    memory = resolve_plan(config, 4, 80.0).memory
    away = sum(line(memory, name).bytes for name in ("weights", "gradients", "optimizer"))
    assert line(memory, "colocated server's pools").bytes == int(0.85 * 80 * GIB) - away


def test_a_sum_that_does_not_fit_names_the_largest_lines_and_their_settings() -> None:
    memory = plan().memory
    with pytest.raises(
        ConfigError, match=r"memory: a rank needs 56\.\d\d GiB \(update\) and the GPU has 40"
    ) as error:
        memory.check(40 * GIB)
    text = str(error.value)
    assert text.index("optimizer 21.28 GiB (optimizer.distributed") < text.index(
        "activations 17.83 GiB (model.recompute"
    )
    command = ["train", str(EXAMPLES / "qwen2.5_7b/laser.yaml"), "--dry-run", "--gpu-memory-gib", "40"]
    result = CliRunner().invoke(app, [*command, f"model.path={EXAMPLES / 'qwen2.5_7b'}", "--world-size", "4"])
    assert result.exit_code == 2
    assert "activations" in result.output and "sum" in result.output  # the table comes first


def test_the_sum_of_a_toy_fits_anything(tmp_path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((EXAMPLES / "qwen2.5_7b/config.json").read_text())
            | {"num_hidden_layers": 2, "vocab_size": 512}
        )
    )
    config = run_config(tmp_path, tmp_path, laser={"enabled": False})
    assert resolve_plan(config).memory.total < 16 * GIB

"""The dry run's memory sum: its formula against a count of what autograd keeps, its parts, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollouts import R, W, rollout_batch
from helpers.runs import run_config
from typer.testing import CliRunner

from megatron_laser.batching.readout_points import at_end, every, readout_points
from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config, resolve_plan
from megatron_laser.config.derived import padded_tokens
from megatron_laser.config.model_folder.architecture import read_architecture
from megatron_laser.config.model_folder.continuation import longest_trained
from megatron_laser.config.plan.activations import layer_activation_bytes
from megatron_laser.config.plan.head_rows import extra_rows
from megatron_laser.config.plan.lines import MemorySum
from megatron_laser.logprob_memory import GIB, choose_keep_budget

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def plan(world_size: int = 4, *overrides: str, name: str = "qwen2.5_7b"):
    config = load_config(EXAMPLES / name / "laser.yaml", [f"model.path={EXAMPLES / name}", *overrides])
    return resolve_plan(config, world_size)


def line(memory: MemorySum, name: str):
    found = [item for item in memory.lines if item.name == name]
    return found[0] if found else None


def keeping(compute, own_output=False):
    """An operation whose backward keeps its inputs (and its output), as the fused kernels do."""

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            result = compute(*inputs)
            ctx.save_for_backward(*inputs, *([result] if own_output else []))
            return result

    return Kept.apply


class Rotate(torch.autograd.Function):
    """Rotary embedding: a new tensor, and nothing of its input is kept."""

    @staticmethod
    def forward(ctx, value):
        return value.roll(1, dims=-1)


def test_a_layers_activations_are_the_storages_that_autograd_keeps() -> None:
    tokens, h, heads, kv_heads, size, f = 256, 64, 4, 2, 16, 96
    q, k = heads * size, kv_heads * size
    arch = dataclasses.replace(
        read_architecture(EXAMPLES / "qwen2.5_7b"),
        hidden_size=h,
        intermediate_size=f,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
    )
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    shapes = ((h,), (q + 2 * k, h), (h, q), (h,), (2 * f, h), (h, f))
    weights = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    norm, qkv, proj, norm2, up, down = weights
    normed = keeping(lambda x, weight: x * weight)
    gated = keeping(lambda x: x[:, :f] * x[:, f:])
    # only the storages count: any arithmetic with the shapes of attention will do
    attention = keeping(lambda a, b, c: a + b.repeat(1, q // k) + c.repeat(1, q // k), own_output=True)
    x = torch.randn(tokens, h, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        query, key, value = (normed(x, norm) @ qkv.t()).split([q, k, k], dim=-1)
        middle = x + attention(Rotate.apply(query), Rotate.apply(key), value) @ proj.t()
        output = middle + gated(normed(middle, norm2) @ up.t()) @ down.t()
    assert output.requires_grad
    for weight in weights:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    expected = layer_activation_bytes(
        arch, tokens=tokens, itemsize=4, tensor=1, sequence=False, recompute="none"
    )
    assert (sum(kept.values()), 0) == expected


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
        "reference model": ["policy.kl_coefficient=0.01"],
        "in-process engine: cache": ["rollout.engine=in_process", "rollout.max_batch_size=4"],
    }.items():
        assert line(plain, name) is None
        assert line(plan(4, *overrides).memory, name).bytes > 0
    assert line(plain, "save: buffer") is None  # one data-parallel rank gathers nothing
    assert line(plan(8).memory, "save: buffer").bytes == 64 * 2**20
    assert line(plan(4, "rollout.weight_sync=disk").memory, "sync: buckets") is None


def kept_line(gpu_memory_gib: float, *overrides: str):
    """The line of the 7B recipe on a GPU of this size; its head needs 16384 rows x 38016 columns x 2 bytes."""
    folder = EXAMPLES / "qwen2.5_7b"
    config = load_config(folder / "laser.yaml", [f"model.path={folder}", *overrides])
    memory = resolve_plan(config, 4, gpu_memory_gib).memory
    return line(memory, "kept probabilities"), memory


def test_what_is_kept_is_counted_by_the_rule_that_the_op_applies() -> None:
    whole = 2 * 16384 * 152064 // 4
    all_kept, _ = kept_line(79.1)
    assert all_kept.bytes == whole and "all of them in bfloat16" in all_kept.detail
    without, memory = kept_line(79.1, "model.keep_logits_gib=0")
    assert without is None
    # With half a GiB to give the plan says so, and what happens to the rest.
    size = next(
        gib
        for gib in range(50, 80)
        if choose_keep_budget(int((gib - memory.total / GIB) * GIB), gib * GIB) == GIB // 2
    )
    part, tight = kept_line(size)
    assert part.bytes == GIB // 2 and f"{GIB / 2 / whole:.0%} of 1.16 GiB; the loss in blocks" in part.detail
    assert tight.total <= size * GIB


# The 7B recipe: 16,384 tokens a micro-batch, 1024 responses an optimizer step on the one data-parallel rank of 4.
ROWS = {
    "[{}]": 0,
    "[{position: before_eos}]": 0,
    # two tokens behind each response, one of which takes no place that a token has not
    "[{tokens: [151652, 151653], score: pair_sigmoid}]": 1024,
    "[{}, {name: p, tokens: [151652, 151653, 151654], score: normalised, position: {every: 128}}]": 3 * 128,
    "[{}, {name: d, position: {delimiter: x}}, {name: e, tokens: 151653}]": 16384 // 16 + 1024,
}


@pytest.mark.parametrize(("readouts", "more"), ROWS.items())
def test_rows_of_readouts_are_counted_where_the_head_has_them(readouts, more) -> None:
    rows, h, columns = 16384 + more, 3584, 152064 // 4
    kept, memory = kept_line(79.1, f"laser.readouts={readouts}", "rollout.samples_per_prompt=8")
    assert kept.bytes == 2 * rows * columns
    tile = 528 * 2**20
    head = line(memory, "log-prob head")
    assert head.bytes == 2 * h * (16384 + 2 * rows) + 4 * h * rows + tile + tile // 2
    assert (f"{more:,} rows of readouts" in head.detail) is (more > 0)
    step = line(memory, "the step's micro-batches")
    tokens = int(step.detail.split()[2].replace(",", ""))
    between = {3 * 128: 3 * tokens // 128, 2048: tokens // 16 + 1024}.get(more, more)
    assert step.bytes == 56 * (tokens + between)


def test_the_rows_of_a_batch_stay_below_what_is_counted(tmp_path) -> None:
    """Short prompts, and responses one shorter than a multiple of n or just beyond it."""
    readouts_ = [
        {},
        {"name": "pair", "tokens": [240, 241], "score": "pair_sigmoid", "advantages": "none"},
        {"name": "prefix", "tokens": [242, 243], "score": "normalised", "position": {"every": 3}},
    ]
    config = run_config(
        tmp_path,
        tmp_path,
        laser={"readouts": readouts_},
        rollout={"max_new_tokens": 15},
        data={"max_prompt_tokens": 1},
    )
    groups = [[R(n), W(n), R(n), W(n)] for n in (1, 4, 7, 13)]
    flat = rollout_batch(groups, prompt_lengths=[1] * 4)
    token_ids = ((249,), (240, 241), (242, 243))
    points = readout_points(flat, (at_end, at_end, every(3)), token_ids)
    tokens, responses = len(flat.tokens), flat.num_samples
    rows = int(flat.response_lengths.sum()) + int(points.slot_starts[-1])
    counted = tokens + extra_rows(config, tokens, responses * 16)
    assert tokens < rows <= counted < rows + 2 * tokens / 3
    # of the prefix's rows: 2 x (0 + 1 + 2 + 4) x 4 there, 2 x floor(116 / 3) counted
    assert (rows, counted) == (100 + 16 * 3 + 2 * 28, 116 + 2 * 16 + 2 * (116 // 3))


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ([], 0),
        ([{"tokens": [240, 241], "score": "pair_sigmoid", "position": {"forced": "w9"}}], 1),
        ([{"tokens": [240, 241], "score": "pair_sigmoid"}, {"position": {"forced": "w9"}}], 2),
    ],
)
def test_a_response_ends_by_itself_or_is_cut_off(tmp_path: Path, more: list[Any], rows: int) -> None:
    """One of the longest has max(rows at its end, rows behind the forced text) - 1 beside one a token."""
    more = [{"name": f"r{i}", "advantages": "none", **entry} for i, entry in enumerate(more)]
    config = run_config(tmp_path, tmp_path, laser={"readouts": [{}, *more]})
    longest = padded_tokens(longest_trained(config), config.parallel)
    assert extra_rows(config, 5 * longest, 5 * longest) == 5 * rows


def test_sampled_sets_are_counted_for_all_minibatches_of_a_rollout_batch() -> None:
    assert line(plan().memory, "sampled sets") is None
    narrow = ("rollout.top_k=50", "rollout.top_p=0.95", "policy.minibatches=4")
    memory = plan(4, *narrow).memory
    tokens = int(line(memory, "the step's micro-batches").detail.split()[2].replace(",", ""))
    sets = line(memory, "sampled sets")
    assert sets.bytes == 8 * 50 * 4 * tokens and f"{4 * tokens:,}" in sets.detail


def test_auto_never_makes_a_plan_fail() -> None:
    _, least = kept_line(79.1, "model.keep_logits_gib=0")
    for size in (least.total / GIB + more for more in (0.0, 0.5, 3.0, 5.0, 6.0, 9.0, 30.0)):
        kept, memory = kept_line(size)
        assert memory.total <= size * GIB
        assert kept.bytes > 0 or "all recomputed" in kept.detail
    assert kept_line(least.total / GIB)[0].bytes == 0


@pytest.mark.parametrize(("setting", "expected"), [(0.25, GIB // 4), (1, GIB), (50, 2 * 16384 * 38016)])
def test_a_number_is_counted_as_set_up_to_what_is_needed(setting, expected) -> None:
    kept, _ = kept_line(79.1, f"model.keep_logits_gib={setting}")
    assert kept.bytes == expected and kept.detail.startswith("as set: ")


def test_colocated_servers_take_the_trainers_place(tmp_path) -> None:
    model = EXAMPLES / "qwen2.5_7b"
    options = {"--mem-fraction-static": 0.7}
    sglang = {"options": options, "servers": 4}
    rollout = {"engine": "sglang", "weight_sync": "colocated", "sync_deadline": 50, "sglang": sglang}
    config = run_config(
        tmp_path,
        model,
        "model.dtype=bfloat16",
        "model.vocab_multiple=128",
        rollout=rollout,
        parallel={"tensor": 4},
        laser={"enabled": False},
    )
    memory = resolve_plan(config, 4, 80.0).memory
    away = sum(line(memory, name).bytes for name in ("weights", "gradients", "optimizer"))
    assert line(memory, "colocated server's pools").bytes == int(0.7 * 80 * GIB) - away


def test_padding_beyond_the_budget_is_counted() -> None:
    padded = plan(4, "batching.pad_multiple=40000").memory
    assert "40,000 tokens" in line(padded, "activations").detail
    assert padded.total > plan().memory.total


def test_a_sum_that_does_not_fit_names_the_largest_lines_and_their_settings() -> None:
    memory = plan().memory
    with pytest.raises(
        ConfigError, match=r"memory: a rank needs 57\.\d\d GiB \(update\) and the GPU has 40"
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
    command.remove("--dry-run")
    assert "goes with --dry-run" in CliRunner().invoke(app, command).output
    for nothing in ("0", "-1", "nan"):
        refused = CliRunner().invoke(app, [*command[:-1], nothing, "--dry-run"])
        assert refused.exit_code == 2 and "expected more than 0" in refused.output


def test_the_sum_of_a_toy_fits_anything(tmp_path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((EXAMPLES / "qwen2.5_7b/config.json").read_text())
            | {"num_hidden_layers": 2, "vocab_size": 512, "eos_token_id": 1}
        )
    )
    config = run_config(tmp_path, tmp_path, laser={"enabled": False})
    assert resolve_plan(config).memory.total < 16 * GIB

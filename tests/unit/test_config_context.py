"""Context parallelism in the configuration: what lengths divide by, what a rank holds, and what the dry run says."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from helpers.runs import run_config
from rich.console import Console
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import load_config, resolve_plan
from megatron_laser.config.derived import (
    gpu_pad_multiple,
    micro_batch_tokens,
    needed_pad_multiple,
    padded_tokens,
)
from megatron_laser.config.plan.view import render_plan
from megatron_laser.config.schema.system import ParallelConfig
from megatron_laser.logprob_memory import GIB

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Qwen2.5-32B at tensor 8: key/value heads 8 x 128, query heads 40 x 128, bf16.
KEYS, QUERIES = 8 * 128 // 8, 40 * 128 // 8


def load(*overrides: str):
    """The 32B recipe on one pipeline stage."""
    folder = EXAMPLES / "qwen2.5_32b"
    return load_config(folder / "laser.yaml", [f"model.path={folder}", "parallel.pipeline=1", *overrides])


def plan(world_size: int, *overrides: str):
    return resolve_plan(load(*overrides), world_size)


def line(found, name: str):
    (item,) = [item for item in found.memory.lines if item.name == name]
    return item


def text(found) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(render_plan(found))
    return console.file.getvalue()


def test_the_needed_multiple_is_the_smallest_that_every_cut_divides() -> None:
    for context in (1, 2, 3, 4, 8):
        for tensor in (1, 2, 3, 4, 8):
            for sequence in (False, True) if tensor > 1 else (False,):
                chunks = 2 * context if context > 1 else 1
                smallest = next(
                    tokens
                    for tokens in range(1, 1000)
                    if tokens % chunks == 0 and (tokens // context) % (tensor if sequence else 1) == 0
                )
                parallel = ParallelConfig(context=context, tensor=tensor, sequence=sequence)
                assert needed_pad_multiple(parallel) == smallest


def test_each_sequence_is_padded_by_less_than_twice_the_context_ranks() -> None:
    assert [padded_tokens(n, ParallelConfig(context=2)) for n in (1, 4, 5)] == [4, 4, 8]
    assert [padded_tokens(n, ParallelConfig(context=3)) for n in (1, 6, 7)] == [6, 6, 12]
    assert [padded_tokens(n, ParallelConfig(tensor=4)) for n in (1, 5)] == [1, 5]


def test_the_budget_is_of_one_rank_and_the_default_padding_leaves_each_rank_its_multiple() -> None:
    alone, shared = load(), load("parallel.context=4")
    assert micro_batch_tokens(alone) == 16384
    assert micro_batch_tokens(shared) == 4 * 16384
    assert gpu_pad_multiple(alone) == 128 * 8
    assert gpu_pad_multiple(shared) == 4 * 128 * 8
    assert gpu_pad_multiple(load("parallel.context=4", "batching.pad_multiple=64")) == 64


def test_context_ranks_are_taken_from_data_parallel_ones_and_share_the_optimizer() -> None:
    alone, shared = plan(32), plan(32, "parallel.context=2")
    assert (alone.layout.data, shared.layout.data) == (4, 2)
    assert (alone.layout.world_size, shared.layout.world_size) == (32, 32)
    assert shared.bytes_per_rank == alone.bytes_per_rank  # 4 shards of the optimizer either way
    assert line(shared, "optimizer").detail == "sharded over 4"
    assert shared.batch.sequences_per_rank == 2 * alone.batch.sequences_per_rank
    assert resolve_plan(load("parallel.context=2")).layout.world_size == 16  # one copy of the model


def test_a_rank_holds_as_many_tokens_as_without_and_the_rings_buffers() -> None:
    alone, shared = plan(32), plan(32, "parallel.context=2")
    for name in ("activations", "one layer's backward", "log-prob head", "kept probabilities"):
        assert line(shared, name).bytes == line(alone, name).bytes
    # two buffers of keys and values and two of their gradients
    assert line(shared, "context attention").bytes == (2 + 2) * 2 * 16384 * 2 * KEYS
    assert "16,384 tokens on each of 2 context ranks" in line(shared, "activations").detail
    assert not [item for item in alone.memory.lines if item.name == "context attention"]


def test_a_step_of_few_tokens_is_shared_too() -> None:
    few = "rollout.prompts_per_step=1", "rollout.samples_per_prompt=2", "batching.pad_multiple=64"
    alone, shared = plan(16, *few), plan(16, "parallel.context=2", *few)
    assert alone.batch.tokens_per_rank == 10240 and shared.batch.tokens_per_rank == 2 * 10240
    assert "10,240 tokens," not in line(shared, "activations").detail
    assert "10,240 tokens on each of 2" in line(shared, "activations").detail
    assert line(shared, "the step's micro-batches").bytes == 56 * 10240


def test_the_padding_of_sequences_and_of_the_end_is_counted() -> None:
    longest = "data.max_prompt_tokens=2049"  # 2049 + 8192 = 10241, in chunks of 2561
    tight = "parallel.context=2", "parallel.sequence=false", "batching.tokens_per_micro_batch=5121"
    found = plan(16, longest, *tight, "batching.pad_multiple=4")
    assert found.batch.tokens_per_rank == found.batch.sequences_per_rank * 10244
    assert "5,122 tokens on each" in line(found, "activations").detail  # more than the budget
    padded = plan(16, longest, *tight, "batching.pad_multiple=20000")
    assert "10,000 tokens on each" in line(padded, "activations").detail


def test_micro_batches_are_counted_with_padded_sequences() -> None:
    odd = "data.max_prompt_tokens=2047", "rollout.max_new_tokens=2047"  # 4094, padded to 4096
    alone, shared = (
        plan(8, *odd),
        plan(16, "parallel.context=2", "batching.tokens_per_micro_batch=4095", *odd),
    )
    assert alone.batch.micro_batches_per_rank == 256  # 4 to a micro-batch
    assert shared.batch.micro_batches_per_rank == 1024  # 8190 tokens hold 1, not 2


def test_layers_of_torch_hold_the_keys_of_all_context_ranks() -> None:
    memory = {}
    for layers in ("auto", "torch"):
        for recompute in ("none", "full"):
            settings = f"model.layers={layers}", f"model.recompute={recompute}"
            memory[layers, recompute] = plan(16, "parallel.context=2", *settings)
    gathered = 2 * 2 * (2 * 16384) * QUERIES + 2 * 16384 * 10240  # keys and values, masks
    for recompute, name, times in (("none", "activations", 64), ("full", "one layer's backward", 1)):
        torch, fused = (line(memory[layers, recompute], name).bytes for layers in ("torch", "auto"))
        assert torch - fused == times * gathered
    exact = plan(16, "parallel.context=2", "model.dtype=float32", "batching.tokens_per_micro_batch=5120")
    assert line(exact, "context attention").bytes == 4 * 2 * 2 * 5120 * (2 * QUERIES + 2 * KEYS) // 2


@pytest.mark.parametrize(
    ("context", "groups"),
    [
        (1, 3),  # tensor, data, all
        (2, 4),  # and context
        (4, 6),  # and a communicator for each neighbour in the ring
    ],
)
def test_each_communicator_is_allowed_for(context: int, groups: int) -> None:
    found = plan(64, f"parallel.context={context}")
    assert line(found, "NCCL").detail.startswith(f"{groups} groups")
    assert line(plan(8 * context, f"parallel.context={context}"), "weights").bytes


def test_context_ranks_alone_gather_for_a_save() -> None:
    found = plan(16, "parallel.context=2")
    assert found.layout.data == 1 and line(found, "save: buffer").bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("tokens", "context", "forward", "backward"),
    [(32 * 1024, 2, "8.00 MiB", "16.00 MiB"), (128 * 1024, 8, "56.00 MiB", "112.00 MiB")],
)
def test_32b_at_long_sequences_fits_64_gpus_and_the_reason_is_said(
    tokens, context, forward, backward
) -> None:
    length = f"rollout.max_new_tokens={tokens - 2048}"
    found = plan(64, length, f"parallel.context={context}")
    found.memory.check(0.9 * found.gpu_memory_gib * GIB)
    shown = text(found)
    assert (
        f"{context} ranks share each sequence, 16,384 tokens each of the longest, {tokens:,}, which is more than "
        f"batching.tokens_per_micro_batch 16,384 and fits because {context} ranks share it; the same micro-batch on "
        f"one rank would be {29.75 * context:.2f} GiB of activations; a rank sends {forward} of keys and values a "
        f"layer in the forward, {backward} with gradients in the backward"
    ) in shown
    assert f"micro-batches of up to {tokens:,}, 16,384 on each context rank" in shown
    # C - 1 times to the next rank; in the backward once more with the gradients
    sent = (context - 1) * 2 * 2 * 16384 * KEYS
    assert (found.context.attention.forward, found.context.attention.backward) == (sent, 2 * sent)
    assert math.isclose(sent / 2**20, float(forward.split()[0]))


def test_the_figures_of_the_scaling_page_are_the_plans() -> None:
    page = (EXAMPLES.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    for tokens, context in ((32768, 2), (131072, 8)):
        found = plan(64, f"rollout.max_new_tokens={tokens - 2048}", f"parallel.context={context}")
        kept, sent = line(found, "activations").bytes / GIB, found.context.attention
        assert (
            f"| {tokens:,} | {context} x {found.layout.data} | {kept:.2f} GiB | {context * kept:.2f} GiB | "
            f"{found.memory.total / GIB:.2f} GiB | {sent.forward // 2**20} + {sent.backward // 2**20} MiB |"
        ) in page


def test_a_context_that_is_not_needed_is_called_so() -> None:
    shown = text(plan(16, "parallel.context=2"))
    assert (
        "5,120 tokens each of the longest, 10,240, which batching.tokens_per_micro_batch 16,384 holds"
        in shown
    )
    assert "share each sequence" not in text(plan(16))


def test_the_dry_run_shows_ranks_data_size_and_memory_of_a_context_of_two(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        EXAMPLES / "octothinker_3b",
        parallel={"context": 2, "tensor": 2},
        batching={"tokens_per_micro_batch": 64},
    )
    assert config.parallel.context == 2
    command = ["train", str(tmp_path / "config.yaml"), "--dry-run", "--world-size", "8"]
    result = CliRunner(env={"COLUMNS": "400"}).invoke(
        app, [*command, "laser.score_token=128002", "optimizer.distributed=true"]
    )
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.replace("\u2502", " ").split())
    for part in (
        "8 ranks, tensor 2, pipeline 1, virtual pipeline 1, context 2, data 2",
        "2 ranks share each sequence, 64 tokens each of the longest, 128, which is more than",
        "micro-batches of up to 128, 64 on each context rank",
        "context attention",
    ):
        assert part in shown, shown

"""How many layers each pipeline stage has: by hand, and by comparing `balanced` with every possible cut."""

from itertools import product

import pytest
from helpers.runs import run_config

from megatron_laser.config import ConfigError, read_architecture
from megatron_laser.config.checks.layout import check_layout, stage_problems
from megatron_laser.config.plan.resolve import resolve_plan
from megatron_laser.config.schema.system import ParallelConfig
from megatron_laser.config.stages import (
    balanced_chunks,
    chunk_layers,
    head_layers,
    layers_per_stage,
)

from helpers.models import save_tiny_model  # isort: skip


def slowest(on_stage, head):
    return max(layers + head * (stage == len(on_stage) - 1) for stage, layers in enumerate(on_stage))


@pytest.mark.parametrize("head", [0.0, 0.4, 1.0, 2.6, 50.0])
@pytest.mark.parametrize(("layers", "stages", "chunks"), [(4, 2, 1), (11, 3, 1), (12, 2, 2), (13, 3, 2)])
def test_no_other_cut_has_a_faster_slowest_stage(layers, stages, chunks, head):
    found = balanced_chunks(layers, stages, chunks, head)
    assert sum(found) == layers and min(found) >= 1 and len(found) == stages * chunks
    on_stage = layers_per_stage(found, stages)
    cuts = (cut for cut in product(range(chunks, layers + 1), repeat=stages) if sum(cut) == layers)
    assert slowest(on_stage, head) == min(slowest(cut, head) for cut in cuts)
    # A stage's chunks are as equal as its layers allow, its first ones larger.
    for stage in range(stages):
        own = found[stage::stages]
        assert max(own) - min(own) <= 1 and list(own) == sorted(own, reverse=True)


def test_equal_stages_are_filled_from_the_back():
    """The first ones keep the activations of the most micro-batches."""
    assert balanced_chunks(10, 4, 1, 0.0) == (2, 2, 3, 3)
    assert balanced_chunks(10, 4, 1, 1.0) == (2, 3, 3, 2)


def test_the_head_is_counted_in_layers(tmp_path):
    save_tiny_model(tmp_path, "qwen2")
    config = run_config(tmp_path, tmp_path, laser={"enabled": False})
    arch = read_architecture(tmp_path)
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    q, k = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    weights = arch.hidden_size * (2 * q + 2 * k + 3 * arch.intermediate_size)
    layer = tokens * 2 * weights + 4 * q * tokens * (tokens + 1) // 2
    head = 2 * (config.rollout.max_new_tokens + 1) * arch.hidden_size * arch.vocab_size
    assert head_layers(config, arch) == pytest.approx(head / layer)


@pytest.mark.parametrize(
    ("settings", "layers", "said"),
    [
        ({"pipeline": 3}, 4, "4 % 3 = 1; set parallel.stage_layers to balanced"),
        (
            {"pipeline": 4, "stage_layers": "balanced"},
            3,
            "num_hidden_layers 3 is less than parallel.pipeline 4",
        ),
        ({"pipeline": 2, "stage_layers": [3, 2]}, 4, "3 + 2 = 5, and num_hidden_layers is 4"),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "stage_layers": [2, 2]},
            4,
            "has 2 numbers: expected one for each of parallel.pipeline 2 x virtual_pipeline 2 = 4",
        ),
    ],
)
def test_what_cannot_be_cut_is_said_with_the_arithmetic(settings, layers, said):
    (problem,) = stage_problems(ParallelConfig(**settings), layers)
    assert said in problem


@pytest.mark.parametrize("wanted", ["[2, 0]", "[]", "[2, -1]", "some", "[a, b]", "[1.0, 3]"])
def test_other_values_are_refused_when_the_file_is_read(tmp_path, wanted):
    save_tiny_model(tmp_path, "qwen2")
    overrides = ("parallel.pipeline=2", f"parallel.stage_layers={wanted}")
    with pytest.raises(
        ConfigError, match="stage_layers: expected even, balanced or a list with the number of"
    ):
        run_config(tmp_path, tmp_path, *overrides, laser={"enabled": False})


def test_the_plan_counts_each_stage_s_layers(tmp_path):
    save_tiny_model(tmp_path, "qwen2")
    plans = {}
    for cut in ("even", "[1, 3]", "[3, 1]"):
        settings = ("parallel.pipeline=2", f"parallel.stage_layers={cut}")
        config = run_config(tmp_path, tmp_path, *settings, laser={"enabled": False})
        check_layout(config, read_architecture(tmp_path), 2)
        plans[cut] = resolve_plan(config, 2)
        assert sum(plans[cut].layout.stage_layers) == 4
    one = (plans["[1, 3]"].stage_parameters[1] - plans["even"].stage_parameters[1], 3 - 2)
    layer = one[0] // one[1]
    for cut, (first, last) in (("[1, 3]", (-1, 1)), ("[3, 1]", (1, -1))):
        difference = [a - b for a, b in zip(plans[cut].stage_parameters, plans["even"].stage_parameters)]
        assert difference == [first * layer, last * layer]
    assert chunk_layers(plans["even"].config, plans["even"].architecture) == (2, 2)
    # The first stage keeps two micro-batches, and so is the fullest with three of four layers.
    activations = {cut: next(x for x in plans[cut].memory.lines if x.name == "activations") for cut in plans}
    assert "the first stage" in activations["[3, 1]"].detail and "3 layers" in activations["[3, 1]"].detail

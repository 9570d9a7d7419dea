"""The Megatron model against transformers, for every family and layout, and its weights there and back."""

import json
from pathlib import Path

import pytest
from helpers.models import FAMILIES, save_tiny_model
from helpers.ranks import run_ranks

from megatron_laser.model.hf_folder import HfFolder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("hf_parity_worker.py")
LAYOUTS = (
    "data 2",
    "tensor 2",
    "tensor 2, shard of padding",
    "tensor 2, sequence",
    "pipeline 2",
    "context 2",
)
EXPERTS = ("qwen3-moe", "qwen3-moe-unnormalised", "mixtral")
EXPERT_LAYOUTS = (
    *("data 2", "tensor 2, sequence", "pipeline 2", "context 2"),
    *("expert 2", "expert 2 within tensor 2", "expert tensor 2"),
)
CASES = [
    (family, layout) for family in FAMILIES for layout in (EXPERT_LAYOUTS if family in EXPERTS else LAYOUTS)
]
# Every layout of a dense model, every family once, and each way to share out experts; the others are `long`.
CORE = [
    *(("qwen2", layout) for layout in LAYOUTS),
    *(("qwen2-tied", "tensor 2, shard of padding"), ("qwen2-tied", "pipeline 2")),
    *(("qwen3", "tensor 2, sequence"), ("qwen3-untied", "tensor 2"), ("llama3-rope", "context 2")),
    *(("qwen3-moe", layout) for layout in ("tensor 2, sequence", "pipeline 2", "expert 2")),
    ("qwen3-moe-unnormalised", "expert 2 within tensor 2"),
    REFUSED := ("mixtral", "expert tensor 2"),
]
every_case = pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(*case, marks=() if case in CORE else pytest.mark.long, id="-".join(case))
        for case in CASES
    ],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        # One of them in many files with an index, as large models come.
        save_tiny_model(folder / family, family, max_shard_size="60KB" if family == "qwen2" else "1GB")
    assert (folder / "qwen2" / "model.safetensors.index.json").is_file()
    return folder


class Results:
    """[family, layout] to what the worker found. It is started for the cases of CORE, or those besides, when asked."""

    def __init__(self, models):
        self._models, self._found = models, {}

    def __getitem__(self, case):
        if case not in self._found:
            # Which is also what ranks refuse a part of: always among them.
            cases = CORE if case in CORE else [*(one for one in CASES if one not in CORE), REFUSED]
            self._found |= dict.fromkeys(cases)  # not again, if it fails
            asked, said = self._models / "cases.json", self._models / "results.json"
            asked.write_text(json.dumps(cases))
            run_ranks(WORKER, 2, self._models, asked, said)
            found = json.loads(said.read_text())
            assert set(found) == {f"{family}, {layout}" for family, layout in cases}
            self._found |= {one: found[", ".join(one)] for one in cases}
        assert self._found[case] is not None, "the worker failed, see an earlier test"
        return self._found[case]


@pytest.fixture(scope="module")
def results(models):
    return Results(models)


@every_case
def test_packed_logits_and_logprobs_equal_separate_transformers_forwards(results, family, layout):
    result = results[family, layout]
    assert result["logits"] < 1e-5
    assert result["logprobs"] < 1e-5


@every_case
def test_each_rank_reads_its_shard_and_nothing_else(results, family, layout):
    result = results[family, layout]
    assert result["read_too_much"] == 0
    assert result["wholly_read_matrices"] == 0


@every_case
def test_export_is_bit_identical_under_the_names_of_transformers(models, results, family, layout):
    result = results[family, layout]
    with HfFolder(models / family) as original:
        assert result["names"] == sorted(original.names())
    assert result["changed"] == []
    assert result["streamed_elsewhere"] == 0
    assert ("lm_head.weight" in result["names"]) == (
        family in ("qwen2", "qwen3-untied", "llama3-rope", "qwen3-moe", "mixtral")
    )


@every_case
def test_transformers_loads_the_sharded_export_and_computes_the_same(results, family, layout):
    result = results[family, layout]
    assert result["shards"] > 1
    assert result["transformers_logits_equal"]


def test_every_rank_refuses_what_one_has_found_in_its_part(models, results):
    assert results[REFUSED]
    first, second = json.loads((models / "refusals.json").read_text())
    assert first == second and "experts.7.w2.weight' holds NaN or infinity" in first


def test_every_family_and_every_layout_is_among_those_that_run_always():
    assert {family for family, _ in CORE} == set(FAMILIES)
    assert {layout for _, layout in CORE} == {layout for _, layout in CASES}

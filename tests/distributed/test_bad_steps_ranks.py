"""A bad number on one rank makes every rank skip the update, under every layout and optimizer."""

import json
from pathlib import Path

import pytest
from helpers.models import save_tiny_model
from helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("bad_steps_worker.py")
LAYOUTS = (
    "data 2",
    "data 2, distributed, bf16, overlapped",
    "tensor 2",
    "pipeline 2",
    "context 2",
    "context 2, distributed",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_steps")
    save_tiny_model(folder / "model", "qwen2")
    run_ranks(WORKER, 2, folder / "model", folder / "results.json")
    found = json.loads((folder / "results.json").read_text())
    assert tuple(found) == LAYOUTS
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_skip_what_one_rank_found(results, layout):
    ranks = results[layout]
    for rank in ranks:
        assert rank["bad"] == ["policy_loss", "total_loss"] and rank["bad_steps"] == 1.0
        assert rank["unchanged"] and rank["trained"] and rank["as_if_it_had_never_been"]
    if layout != "tensor 2":  # there both ranks compute the loss
        assert [rank["own_is_bad"] for rank in ranks].count(True) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_stop_together_after_too_many_and_only_when_the_dump_is_there(results, layout):
    for number, rank in enumerate(results[layout]):
        assert f"step 5, rank {number}: 2 steps in a row" in rank["error"]
        assert rank["dumped"]

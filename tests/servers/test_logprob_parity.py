"""A parallel trainer and a real server agree on every log-prob after each kind of weight sync."""

import json
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.sglang, pytest.mark.distributed]

WORKER = Path(__file__).with_name("logprob_parity_worker.py")
TOLERANCE = 1e-4
CASES = [
    f"{layout_and_sync}, {model}"
    for layout_and_sync in (
        *("tensor 2, disk", "tensor 2, tensor by tensor", "tensor 2, flattened"),
        "pipeline 2, flattened",
    )
    for model in ("first", "second")
]


@pytest.fixture(scope="module")
def figures(sglang_server, tmp_path_factory):
    """Largest differences by layout, sync and model, from one run on two ranks."""
    folder = tmp_path_factory.mktemp("parity")
    model = AutoModelForCausalLM.from_pretrained(sglang_server.model, dtype=torch.float32)
    torch.manual_seed(5)
    for name in ("first", "second"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / "models" / name)
    run_ranks(
        WORKER,
        2,
        sglang_server.url,
        sglang_server.api_key or "",
        folder / "models",
        folder / "figures.json",
        timeout=240,
    )
    found = json.loads((folder / "figures.json").read_text())
    for case, values in found.items():
        print(f"{case}: {values}")
    return found


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_scores_of_server_and_trainer_are_equal(figures, case):
    assert figures[case]["responses"] < TOLERANCE
    assert figures[case]["scores"] < TOLERANCE
    assert figures[case]["scored"] > 0


def test_nothing_else_was_measured(figures):
    assert sorted(figures) == sorted(CASES)

"""docs/metrics.md names what the code writes, and nothing else; a whole run checks its own keys in test_resume.py."""

import json
import re

import pytest
import torch
from helpers.documented import names, undocumented
from helpers.source_tree import PACKAGE, ROOT

from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.summary import summarize
from megatron_laser.observability.rollout_metrics import readout_metrics, rollout_metrics
from megatron_laser.trainer.run_readouts import ReadoutScores
from megatron_laser.trainer.step_metrics import MEAN_KEYS, TOKEN_MEAN_KEYS
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for path in (ROOT / PACKAGE).rglob("*.py")
    if not {"benchmarks", "testtime"} & set(path.parts)  # whose tables are not a run's
)


def test_terms_of_the_loss_are_explained():
    assert undocumented([*MEAN_KEYS, *TOKEN_MEAN_KEYS]) == []


def test_what_is_assigned_by_name_is_explained():
    """metrics["..."] = and the servers' and phases' names, wherever they are in the code."""
    assigned = set(re.findall(r'metrics\["([\w/]+)"\] =', SOURCE))
    assigned |= set(re.findall(r'"(rollout/\w+|memory/\w+)"', SOURCE))
    phases = set(re.findall(r'timers\("(\w+)"\)', SOURCE))
    assert len(assigned) > 20 and {"train", "sync", "generate"} <= phases
    assert undocumented([*assigned, *(f"time/{phase}" for phase in phases)]) == []


def batch():
    generation = Generation([5, 6, 1], [-1.0, -1.0, -1.0], "stop", 0)
    groups = []
    for row, source in enumerate(("one", "two")):
        samples = [Sample([3], generation, "", True, reward, "correct") for reward in (1.0, 0.0)]
        groups.append(Group(Prompt(row, "", "", [3], source=source), samples))
    return RolloutBatch(1, 0, groups)


def test_what_a_batch_says_is_explained():
    values = torch.tensor([0.9, 0.2, 0.7, 0.4])
    found = rollout_metrics(batch(), values - 5.0, values)
    index = torch.arange(4).numpy()
    found |= readout_metrics(batch(), [ReadoutScores("x", False, index, index % 3, values)])
    assert "source/one/reward_mean" in found and "readout/x/auroc_quarter_1" in found
    assert undocumented(found) == []


def test_what_an_evaluation_says_is_explained():
    records = [
        EvaluationRecord(
            row=row,
            sample=sample,
            problem="",
            answer="1",
            response="",
            response_ids_length=3 + sample,
            finish_reason="stop",
            scored=True,
            reward=float(sample == row),
            outcome="correct" if sample == row else "wrong",
            extracted="1",
            zc_logprob=-3.0,
            score=0.3 + 0.2 * sample,
            mean_logprob=-0.5 - 0.1 * row,
            answer_class=sample,
        )
        for row in range(2)
        for sample in range(2)
    ]
    found = summarize(records)
    assert "weighted_majority_at_2" in found
    assert undocumented(f"eval/{name}" for name in found) == []


@pytest.mark.parametrize("name", [name for name in names() if "<" not in name])
def test_every_name_on_the_page_is_in_the_code(name):
    """As a whole, or the part that is not made of another name."""
    last = re.sub(r"^(time|readout/<readout>)/", "", name)
    pieces = [
        last,
        *(last.removeprefix(p) for p in ("self_reward_", "score_right_", "score_wrong_", "boxed_")),
    ]
    pieces += [last.removesuffix(s) for s in ("_low", "_high", "_right", "_wrong")]
    assert any(
        f'"{piece}"' in SOURCE or f"{piece}:" in SOURCE or f"{piece}_" in SOURCE for piece in [name, *pieces]
    )


def test_the_page_is_not_a_list_of_everything():
    assert undocumented(["surprise", "eval/surprise", "readout/x/surprise", "eval/average_at_x"]) == [
        "eval/average_at_x",
        "eval/surprise",
        "readout/x/surprise",
        "surprise",
    ]


def test_a_recorded_run_is_explained():
    lines = (ROOT / "tests/data/run_of_megatron_core_0_16/expected_metrics.jsonl").read_text().splitlines()
    assert undocumented(key for line in lines for key in json.loads(line)) == []

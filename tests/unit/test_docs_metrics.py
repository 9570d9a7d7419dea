"""docs/metrics.md names what the code writes, and nothing else; a whole run checks its own keys in test_resume.py."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.documented import EVALUATIONS, TRAINING, patterns, undocumented
from helpers.source_tree import PACKAGE, ROOT

from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.summary import summarize
from megatron_laser.observability.predicted import plan_metrics
from megatron_laser.observability.rollout_metrics import readout_metrics, rollout_metrics
from megatron_laser.rollout.function.runner import failure_counts
from megatron_laser.rollout.progress import _graded, staleness_metrics
from megatron_laser.trainer.expert_routing import Counts, expert_metrics
from megatron_laser.trainer.run_readouts import ReadoutScores
from megatron_laser.trainer.step_metrics import MEAN_KEYS, TOKEN_MEAN_KEYS, readout_key
from megatron_laser.trainer.stragglers import straggler_metrics
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for path in (ROOT / PACKAGE).rglob("*.py")
    if not {"benchmarks", "testtime"} & set(path.parts)  # whose tables are not a run's
)


def batch():
    """Two groups of two sources, with tokens that an environment wrote and a term of the reward."""
    generation = Generation([5, 6, 1], [-1.0, -1.0, -1.0], "stop", 0, sampled=np.array([True, False, True]))
    groups = []
    for row, source in enumerate(("one", "two")):
        samples = [
            Sample([3], generation, "", True, reward, "correct", terms={"format": 0.5})
            for reward in (1.0, 0.0)
        ]
        groups.append(Group(Prompt(row, "", "", [3], source=source), samples))
    return RolloutBatch(1, 0, groups)


def record(row, sample):
    return EvaluationRecord(
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


def written():
    """Names that the code gives for small inputs, and those that it assigns one by one."""
    values, index = torch.tensor([0.9, 0.2, 0.7, 0.4]), torch.arange(4).numpy()
    one = batch()
    found = {*MEAN_KEYS, *TOKEN_MEAN_KEYS, readout_key(1, "x", trained=True)}
    found |= set(rollout_metrics(one, values - 5.0, values))
    found |= set(readout_metrics(one, [ReadoutScores("x", False, index, index % 3, values)]))
    found |= {f"function_failed_{kind}" for kind in failure_counts(Counter())}
    found |= set(staleness_metrics(one.groups, trained_version=1)) | set(_graded(one.groups, [], []))
    found |= set(plan_metrics({"step": 1.0}, {"time/total": 1.0}))
    counted = torch.ones(1, 2, dtype=torch.float64)
    found |= set(expert_metrics(Counts(counted, counted, counted[0, :1], counted[0, :1], counted[0, :1]), 1))
    found |= set(straggler_metrics([{"time/train": 1.0}]))
    found |= {f"eval/{name}" for name in summarize([record(row, i) for row in range(2) for i in range(2)])}
    found |= set(re.findall(r'metrics\["([\w/]+)"\] =', SOURCE))
    found |= set(re.findall(r'"((?:rollout|memory|rate|mfu|servers|idle)/\w+)"', SOURCE))
    return found | {f"time/{phase}" for phase in re.findall(r'timers\("(\w+)"\)', SOURCE)}


def test_what_the_code_writes_is_explained():
    found = written()
    assert {"source/one/reward_mean", "readout/x/auroc_quarter_1", "time/sync", "eval/pass_at_2"} <= found
    assert len(found) > 150 and undocumented(found) == []


@pytest.mark.parametrize(
    ("part", "prefix"), [(TRAINING, ""), (EVALUATIONS, "eval/")], ids=["run", "evaluation"]
)
def test_what_the_page_explains_is_written(part, prefix):
    """By the functions above, or as a name of its own in the code."""
    found = written()
    lost = [
        name
        for name, pattern in patterns(part).items()
        if not any(re.fullmatch(re.escape(prefix) + pattern, key) for key in found)
        and f'"{name}"' not in SOURCE
        and "<source>" not in name
    ]
    assert lost == []


def test_the_page_is_not_a_list_of_everything():
    strange = ["surprise", "eval/surprise", "readout/x/surprise", "eval/average_at_x", "source/x/surprise"]
    assert undocumented([*strange, "source/x/reward_mean"]) == sorted(strange)


def test_a_recorded_run_is_explained():
    lines = (ROOT / "tests/data/run_of_megatron_core_0_16/expected_metrics.jsonl").read_text().splitlines()
    assert undocumented(key for line in lines for key in json.loads(line)) == []

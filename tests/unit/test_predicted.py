"""Predicted and measured seconds: the numbers beside each other, and when something is said of them."""

import pytest

from megatron_laser.observability.predicted import PredictionWatch, plan_metrics

PREDICTED = {"step": 10.0, "generate": 6.0, "grade": 0.0, "logprob": 1.0, "train": 2.5, "sync": 0.5}


def measured(**seconds):
    times = {"generate": 6.0, "logprob": 1.0, "train": 2.5, "sync": 0.5} | seconds
    return {f"time/{phase}": value for phase, value in ({"total": sum(times.values())} | times).items()}


def said(watch, metrics, steps):
    return [line for _ in range(steps) for line in watch.add(PREDICTED, metrics)]


def test_numbers_beside_each_other():
    found = plan_metrics(PREDICTED | {"scoring": 1.0}, measured(train=5.0) | {"time/grade": 0.1})
    assert found == {
        "plan/step_seconds": 10.0,
        "plan/step_ratio": pytest.approx(12.5 / 10.0),
        "plan/generate_seconds": 6.0,
        "plan/generate_ratio": 1.0,
        "plan/grade_seconds": 0.0,  # and no ratio to nothing
        "plan/logprob_seconds": 1.0,
        "plan/logprob_ratio": 1.0,
        "plan/train_seconds": 2.5,
        "plan/train_ratio": 2.0,
        "plan/sync_seconds": 0.5,
        "plan/sync_ratio": 1.0,
    }


def test_a_phase_that_is_off_is_said_once_in_words():
    watch = PredictionWatch("h100")
    slow = measured(train=5.0)
    assert said(watch, slow, 5) == []  # the first does not count, and four are not enough
    assert said(watch, slow, 1) == [
        "train takes 5 s where 2.5 s were predicted for h100: 100% more (medians of 5 steps); "
        'see "Predicted and measured" in docs/observing.md'
    ]
    assert said(watch, slow, 40) == []


def test_it_is_said_again_when_it_changes_much():
    watch = PredictionWatch("h100")
    assert len(said(watch, measured(train=5.0), 30)) == 1
    assert said(watch, measured(train=6.0), 30) == []
    (line,) = said(watch, measured(train=1.2), 30)
    assert line.startswith("train takes 1.2 s where 2.5 s were predicted for h100: 52% less")
    assert said(watch, measured(), 30) == []


def test_what_is_small_or_near_or_rare_is_not_said():
    # 30 % is the limit; sync is 9 % of the step; and the median does not see single steps.
    assert said(PredictionWatch("h100"), measured(train=2.5 * 1.29, generate=6.0 * 0.72), 30) == []
    assert said(PredictionWatch("h100"), measured(sync=0.9), 30) == []
    watch = PredictionWatch("h100")
    assert [
        line for _ in range(10) for line in said(watch, measured(train=9.0), 1) + said(watch, measured(), 2)
    ] == []


def test_a_step_that_is_off_is_named_where_no_phase_is():
    watch = PredictionWatch("mine.yaml")
    (line,) = said(watch, measured() | {"time/total": 15.0}, 30)
    assert line.startswith("a step takes 15 s where 10 s were predicted for mine.yaml: 50% more")
    watch = PredictionWatch("mine.yaml")
    lines = said(watch, measured(train=9.0, generate=12.0), 30)
    assert [line.split()[0] for line in lines] == ["generate", "train"]

"""Curves with intervals, baselines and accuracy by length, from records made by hand."""

import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest

from megatron_laser.algorithms.voting import majority_vote
from megatron_laser.evaluation import EvaluationRecord, evaluation_detail
from megatron_laser.evaluation.summary import accuracy_by_length, reliability_bins


def record(row, sample, **changes):
    values = {
        "row": row,
        "sample": sample,
        "problem": "",
        "answer": "1",
        "response": "",
        "response_ids_length": 10,
        "finish_reason": "stop",
        "scored": True,
        "reward": 0.0,
        "outcome": "wrong",
        "extracted": "2",
        "zc_logprob": -20.0,
        "score": 0.1,
        "mean_logprob": -1.0,
        "answer_class": 0,
    }
    return EvaluationRecord(**(values | changes))


def right(row, sample, **changes):
    return record(
        row, sample, **({"reward": 1.0, "outcome": "correct", "extracted": "1", "answer_class": 1} | changes)
    )


@pytest.fixture(scope="module")
def records():
    """Forty problems: in the first thirty the right answer is in the minority, but sure of itself."""
    found = []
    for row in range(30):
        found += [record(row, 0, score=0.1), record(row, 1, score=0.0), right(row, 2, score=0.9)]
    for row in range(30, 40):
        found += [
            record(row, 0, score=0.6),
            record(row, 1, score=0.2),
            record(row, 2, score=None, scored=False),
        ]
    return found


def test_the_weighted_vote_beats_the_majority_by_an_interval_that_excludes_zero(records):
    detail = evaluation_detail(records, seed=3)
    assert detail["curves"]["majority"]["mean"][-1] == 0.0
    assert detail["curves"]["weighted_majority"]["mean"][-1] == pytest.approx(30 / 40)
    difference = detail["differences"]["weighted_minus_majority"]
    assert difference["mean"][-1] == pytest.approx(0.75)
    assert 0.5 < difference["low"][-1] < 0.75 < difference["high"][-1] < 0.95
    assert (
        difference["mean"][0] == difference["low"][0] == 0.0
    )  # with one response there is nothing to choose


def test_intervals_are_those_of_a_binomial_share(records):
    curve = evaluation_detail(records, num_resamples=2000)["curves"]["weighted_majority"]
    sigma = math.sqrt(0.75 * 0.25 / 40)
    assert curve["low"][-1] == pytest.approx(0.75 - 1.96 * sigma, abs=0.03)
    assert curve["high"][-1] == pytest.approx(0.75 + 1.96 * sigma, abs=0.03)


def test_every_curve_has_a_value_for_every_k_and_ends_in_the_summarys(records):
    detail = evaluation_detail(records)
    assert set(detail["curves"]) == {
        *(
            "average",
            "pass",
            "majority",
            "weighted_majority",
            "best_of",
            "logprob_majority",
            "best_by_logprob",
        )
    }
    for way, curve in detail["curves"].items():
        assert len(curve["mean"]) == len(curve["low"]) == len(curve["high"]) == 3
        assert detail["summary"][f"{way}_at_3"] == detail["summary"][way] == curve["mean"][-1]


def test_votes_by_log_prob_weigh_by_the_geometric_mean_probability():
    logprobs = [-0.1, -1.5, -1.4, -3.0]
    classes = [1, 0, 0, 2]
    problem = [
        record(0, sample, mean_logprob=logprob, answer_class=number, reward=float(number == 1))
        for sample, (logprob, number) in enumerate(zip(logprobs, classes))
    ]
    detail = evaluation_detail(problem)
    winner = majority_vote(classes, weights=[math.exp(value) for value in logprobs])
    assert winner == 0
    assert detail["summary"]["logprob_majority"] == 1.0
    assert detail["summary"]["best_by_logprob"] == 1.0
    assert detail["summary"]["majority"] == 0.0


def test_without_scores_the_log_prob_baseline_is_still_there(records):
    detail = evaluation_detail([record(r.row, r.sample, score=None, scored=False) for r in records])
    assert "weighted_majority" not in detail["curves"] and "logprob_majority" in detail["curves"]
    assert detail["differences"] == {}
    assert math.isnan(detail["verification"]["all"]["auroc"]["value"])
    assert detail["reliability"] == []


def test_the_boxed_filter_leaves_out_responses_without_an_answer():
    found = [
        record(0, 0, score=0.9, extracted=None),
        right(0, 1, score=0.8),
        record(1, 0, score=0.1),
        right(1, 1, score=0.7),
    ]
    verification = evaluation_detail(found)["verification"]
    assert verification["all"]["accuracy_incorrect"]["value"] == 0.5
    assert verification["boxed"]["accuracy_incorrect"]["value"] == 1.0
    assert verification["boxed"]["f1"]["value"] == 1.0


def test_verification_intervals_hold_the_value(records):
    for group in evaluation_detail(records)["verification"].values():
        for metric in group.values():
            assert metric["low"] <= metric["value"] <= metric["high"]


def test_lengths_are_grouped_evenly_and_equal_lengths_stay_together():
    rng = np.random.default_rng(0)
    lengths = rng.permutation([*range(1, 81), *[100] * 20])
    found = [
        record(
            row,
            0,
            response_ids_length=int(length),
            reward=float(length < 50),
            finish_reason="length" if length == 100 else "stop",
        )
        for row, length in enumerate(lengths)
    ]
    groups = accuracy_by_length(found)
    assert sum(group["responses"] for group in groups) == 100
    assert len(groups) == 5 and all(group["responses"] == 20 for group in groups[:-1])
    assert [group["accuracy"] for group in groups[:2]] == [1.0, 1.0]
    assert groups[-1]["longest"] == groups[-1]["shortest"] == 100
    assert (groups[-1]["truncated"], groups[-1]["responses"]) == (1.0, 20)
    assert all(a["longest"] < b["shortest"] for a, b in pairwise(groups))


def test_reliability_counts_each_scored_response_once_by_its_clamped_score():
    found = [
        right(0, 0, score=1.7),
        record(0, 1, score=-0.4),
        record(1, 0, score=0.05),
        right(1, 1, score=None, scored=False),
    ]
    bins = reliability_bins(found)
    assert [(entry["low"], entry["responses"], entry["right"]) for entry in bins] == [
        (0.0, 2, 0.0),
        (0.9, 1, 1.0),
    ]
    assert bins[0]["score_mean"] == pytest.approx(0.025)


def test_without_answers_there_are_no_votes_and_the_best_is_chosen_among_all():
    """A reward that judges texts without boxes: votes would be 0, worse than chance."""
    found = []
    for row in range(4):
        found += [record(row, 0, extracted=None, answer_class=None, score=0.2)]
        found += [right(row, 1, extracted=None, answer_class=None, score=0.9, mean_logprob=-0.1)]
    detail = evaluation_detail(found)
    assert "no response has an answer to compare" in detail["no_votes"]
    assert set(detail["curves"]) == {"average", "pass", "best_of", "best_by_logprob"}
    assert detail["curves"]["best_of"]["mean"] == detail["curves"]["best_by_logprob"]["mean"] == [0.5, 1.0]
    assert set(detail["differences"]) == {"best_minus_average"}
    assert not [name for name in detail["summary"] if "majority" in name]


def test_one_right_response_without_an_answer_is_enough_to_give_no_vote_and_a_wrong_one_is_not():
    answered = [record(0, 0), right(0, 1), record(1, 0, extracted=None, answer_class=None), right(1, 1)]
    detail = evaluation_detail(answered)
    assert detail["no_votes"] is None and detail["curves"]["majority"]["mean"][-1] > 0
    answered[3].extracted = answered[3].answer_class = None
    assert "1 of the 2 right responses have no answer" in evaluation_detail(answered)["no_votes"]


@pytest.mark.parametrize("outcome", ["timeout", "crash"])
def test_a_response_that_could_not_be_graded_says_nothing_about_the_score(outcome):
    records = [record(0, 0, score=0.1), right(0, 1, score=0.9)] * 3
    records = [EvaluationRecord(**{**asdict(one), "row": row}) for row, one in enumerate(records)]
    graded = evaluation_detail(records)
    ungraded = [*records, record(6, 0, score=0.95, outcome=outcome)]
    detail = evaluation_detail(ungraded)
    assert detail["verification"]["all"]["auroc"]["value"] == 1.0
    assert detail["reliability"] == graded["reliability"]
    for name in ("num_scored", "self_reward_ece", "self_reward_f1", "score_wrong_mean"):
        assert detail["summary"][name] == graded["summary"][name]
    assert detail["summary"]["num_responses"] == 7 and detail["summary"][f"outcome/{outcome}"] == 1

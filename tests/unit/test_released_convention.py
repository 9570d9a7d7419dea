"""The released evaluator's F1 beside ours: on records made by hand, and through `evaluate`."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation import EOS, SCRIPT, FakeEngine, run
from test_evaluation import grading as grading  # a fixture
from test_evaluation_detail import record, right

from megatron_laser.evaluation import evaluation_detail, read_records, summarize
from megatron_laser.evaluation.released_convention import released_scores

CUT = {"finish_reason": "length", "scored": False, "score": None, "zc_logprob": None}


def by_the_released_evaluator(responses, threshold=0.5):
    """As the released scripts do it. responses: (has a box, score behind an EOS, right)."""
    called = [(score if box else 0.0) > threshold for box, score, _ in responses]
    verdicts = [verdict for *_, verdict in responses]
    correct = np.mean([c for c, v in zip(called, verdicts) if v])
    incorrect = np.mean([not c for c, v in zip(called, verdicts) if not v])
    return correct, incorrect, 2 * correct * incorrect / (correct + incorrect)


def test_all_responses_count_without_a_box_as_called_wrong_and_cut_off_ones_behind_a_forced_end():
    records = [
        right(0, 0, score=0.9),
        right(0, 1, score=0.4),
        right(0, 2, **CUT, forced_score=0.8),
        record(1, 0, score=0.1),
        record(1, 1, score=0.7, extracted=None, answer_class=None, outcome="no_answer"),
        record(1, 2, **CUT, forced_score=0.6),
        record(2, 0, **CUT, extracted=None, answer_class=None),
        record(2, 1, score=None, zc_logprob=None, extracted=None, outcome="timeout"),
    ]
    summary = summarize(records)
    told = [(True, 0.9, True), (True, 0.4, True), (True, 0.8, True), (True, 0.1, False)]
    told += [(False, 0.7, False), (True, 0.6, False), (False, None, False), (False, None, False)]
    correct, incorrect, f1 = by_the_released_evaluator(told)
    assert (correct, incorrect) == (2 / 3, 4 / 5)
    assert summary["released_self_reward_accuracy_correct"] == pytest.approx(correct)
    assert summary["released_self_reward_accuracy_incorrect"] == pytest.approx(incorrect)
    assert summary["released_self_reward_f1"] == pytest.approx(f1)
    assert summary["num_forced"] == 2
    # ours: 0.9 and 0.4 right, 0.1 and 0.7 wrong
    assert summary["self_reward_f1"] == pytest.approx(0.5) and summary["num_scored"] == 4
    assert summarize(records, threshold=0.75)["released_self_reward_f1"] == pytest.approx(
        by_the_released_evaluator(told, 0.75)[2]
    )
    released = evaluation_detail(records)["verification"]["released"]["f1"]
    assert released["value"] == pytest.approx(f1) and released["low"] <= f1 <= released["high"]


def test_where_all_ended_by_themselves_with_a_box_both_conventions_agree():
    records = [
        right(0, 0, score=0.9),
        right(0, 1, score=0.3),
        record(1, 0, score=0.6),
        record(1, 1, score=0.2),
    ]
    summary = summarize(records)
    for name in ("f1", "accuracy_correct", "accuracy_incorrect", "auroc", "ece", "brier"):
        assert summary[f"released_self_reward_{name}"] == summary[f"self_reward_{name}"]


def test_a_score_that_nobody_asked_for_makes_the_released_metrics_unknown_instead_of_wrong():
    records = [right(0, 0, score=0.9), record(0, 1, score=0.1), right(1, 0, **CUT)]
    assert released_scores(records) == [0.9, 0.1, None]
    assert math.isnan(summarize(records)["released_self_reward_f1"])
    assert "released" not in evaluation_detail(records)["verification"]
    assert summarize(records, missing_is_zero=True)["released_self_reward_accuracy_correct"] == 0.5
    unscored = [replace(one, score=None) for one in records]
    assert math.isnan(summarize(unscored, missing_is_zero=True)["released_self_reward_f1"])


class Forced(FakeEngine):
    """Knows scores behind forced ends, too: -13 for all of them."""

    def score(self, sequences, token_id, *, deadline):
        known = {(row + 100, *g.response_ids.tolist()) for row, group in enumerate(SCRIPT) for g, _ in group}
        own = iter(super().score([s for s in sequences if tuple(s) in known], token_id, deadline=deadline))
        self.forced = [list(s) for s in sequences if tuple(s) not in known] or getattr(self, "forced", [])
        return [next(own) if tuple(s) in known else -13.0 for s in sequences]


def test_an_evaluation_scores_cut_off_responses_with_a_box_behind_the_end_token(grading, tmp_path):
    engine = Forced(SCRIPT)
    summary = run(engine, grading, tmp_path / "forced", force_end_below=100)
    # rows 0 and 1 have one that was cut off each; row 0 one that a stop string ended
    assert engine.forced == [[100, 11, 11, 11, EOS], [100, 11, 1, EOS], [101, 10, 10, 10, EOS]]
    records = read_records(summary.records_path)
    assert [one.forced_score for one in records if one.forced_score is not None] == pytest.approx([0.7] * 3)
    assert all(one.score is None for one in records if one.forced_score is not None)
    plain = run(FakeEngine(SCRIPT), grading, tmp_path / "plain").metrics
    assert math.isnan(plain["released_self_reward_f1"]) and plain["num_forced"] == 0
    new = {name for name in plain if name.startswith("released_")} | {"num_forced"}
    for name in plain.keys() - new:  # our own numbers are what they were
        assert summary.metrics[name] == pytest.approx(plain[name], nan_ok=True, abs=0)
    # right: 0.6, 0.2, 0.7 (forced), 0.8; wrong: 0.7 and 0.7 (forced), 0.9, no box, 0.1
    assert summary.metrics["released_self_reward_accuracy_correct"] == pytest.approx(3 / 4)
    assert summary.metrics["released_self_reward_accuracy_incorrect"] == pytest.approx(2 / 5)


def test_what_does_not_fit_the_model_behind_a_forced_end_is_left_out(grading, tmp_path):
    engine = Forced(SCRIPT)
    summary = run(engine, grading, tmp_path, force_end_below=5)
    assert engine.forced == [[100, 11, 1, EOS]]
    assert math.isnan(summary.metrics["released_self_reward_f1"])

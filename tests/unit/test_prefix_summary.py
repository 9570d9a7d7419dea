"""How early scores of prefixes know right from wrong, and what ending by them saves: against numbers by hand."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation import EvaluationRecord
from megatron_laser.evaluation.prefix_rule import PrefixRule
from megatron_laser.evaluation.prefix_summary import (
    DEFAULT_THRESHOLDS,
    StopBelow,
    auroc_by_position,
    ended_early,
    prefix_detail,
    stop_curve,
)
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.report.plots import prefixes
from megatron_laser.report.prefix_report import prefix_section


def record(sample, right, length, prefixes, score, *, row=0, reason="stop"):
    """`prefixes`: {tokens: score}."""
    return EvaluationRecord(
        row=row,
        sample=sample,
        problem="",
        answer="1",
        response="",
        response_ids_length=length,
        finish_reason=reason,
        scored=score is not None,
        reward=float(right),
        outcome="correct" if right else "wrong",
        extracted="1" if right else "2",
        zc_logprob=None,
        score=score,
        mean_logprob=-1.0,
        answer_class=int(right),
        prefix_tokens=list(prefixes),
        prefix_scores=list(prefixes.values()),
    )


A = record(0, True, 12, {5: 0.8, 10: 0.9}, 0.9)
B = record(1, True, 8, {5: 0.3}, 0.7)
C = record(2, False, 14, {5: 0.5, 10: 0.2}, 0.8)
D = record(3, False, 16, {5: 0.1}, None, reason="length")
E = record(4, False, 10, {5: 0.35}, 0.1)


def test_auroc_by_position_is_that_of_the_responses_that_go_on_there():
    detail = auroc_by_position([A, B, C, D], ordinal=False)
    five, ten = detail["by_position"]
    assert (five["first"], five["last"], five["tokens"], five["responses"], five["right"]) == (
        5,
        5,
        5,
        4,
        0.5,
    )
    # right 0.8, 0.3 against wrong 0.5, 0.1: three of four pairs
    assert five["auroc"] == 0.75
    assert five["score_right_mean"] == pytest.approx(0.55) and five["score_wrong_mean"] == pytest.approx(0.3)
    # of the end right 0.9, 0.7 against wrong 0.8; the fourth has no score there
    assert five["end_auroc"] == 0.5
    assert (ten["responses"], ten["auroc"], ten["end_auroc"]) == (2, 1.0, 1.0)
    assert (detail["end"]["responses"], detail["end"]["auroc"]) == (3, 0.5)


def test_places_of_a_delimiter_are_counted_within_the_response():
    shifted = [
        record(0, True, 9, {2: 0.9, 7: 0.4}, 0.9),
        record(1, False, 9, {6: 0.1, 8: 0.6}, 0.2),
    ]
    first, second = auroc_by_position(shifted, ordinal=True)["by_position"]
    assert (first["first"], first["tokens"], first["auroc"]) == (1, 4.0, 1.0)
    assert (second["first"], second["tokens"], second["auroc"]) == (2, 7.5, 0.0)


def test_a_failed_grading_is_no_verdict():
    failed = record(5, False, 9, {5: 1.0}, 1.0)
    failed.outcome = "timeout"
    detail = auroc_by_position([A, B, C, D, failed], ordinal=False)
    assert detail["by_position"][0]["responses"] == 4 and detail["end"]["responses"] == 3


def test_many_places_share_ten_rows_in_which_a_response_counts_once():
    records = []
    for sample in range(8):
        places = range(5, 5 * (13 + 4 * sample), 5)  # 12 to 40 places
        scores = {place: place / 1000 + (0.5 if sample % 2 else 0.0) for place in places}
        records.append(record(sample, bool(sample % 2), places[-1] + 3, scores, 0.5))
    rows = auroc_by_position(records, ordinal=False)["by_position"]
    assert len(rows) == 10
    assert rows[0]["first"] == 5 and rows[-1]["last"] == 200
    for one, other in pairwise(rows):
        assert other["first"] == one["last"] + 5
    assert rows[0]["responses"] == 8 and rows[0]["auroc"] == 1.0
    # about equally many scores in each row: 8 * 26 / 10
    inside = [
        sum(row["first"] <= place <= row["last"] for each in records for place in each.prefix_tokens)
        for row in rows
    ]
    assert sum(inside) == 208 and min(inside) >= 14 and max(inside) <= 28


def test_the_curve_of_ending_by_hand():
    never, quarter, more, all_of_them = stop_curve([A, B, C, D, E], (0.25, 0.4, 0.95), subsets=20)
    assert (never["threshold"], never["ended"], never["tokens_saved"]) == (None, 0.0, 0.0)
    # two right against three wrong; weighted 0.9 + 0.7 against 0.8 + 0 + 0.1
    assert [never[way]["value"] for way in ("accuracy", "majority", "weighted_majority")] == [0.4, 0.0, 1.0]
    # C ends after 10 of 14 tokens and D after 5 of 16, of 60 in all; A and B outvote E
    assert (quarter["ended"], quarter["right_ended"]) == (0.4, 0.0)
    assert quarter["tokens_saved"] == pytest.approx(15 / 60)
    assert [quarter[way]["value"] for way in ("accuracy", "majority")] == [0.4, 1.0]
    assert quarter["majority"]["change"] == 1.0 and quarter["accuracy"]["change"] == 0.0
    # B (3 tokens fewer) and E (5 fewer) as well: A is left
    assert (more["ended"], more["right_ended"]) == (0.8, 0.5)
    assert more["tokens_saved"] == pytest.approx(23 / 60)
    assert [more[way]["value"] for way in ("accuracy", "majority", "weighted_majority")] == [0.2, 1.0, 1.0]
    # A too, at its first place: nobody has a vote, and no choice is wrong
    assert all_of_them["ended"] == all_of_them["right_ended"] == 1.0
    assert all_of_them["tokens_saved"] == pytest.approx(35 / 60)
    values = [all_of_them[way]["value"] for way in ("accuracy", "majority", "weighted_majority")]
    assert values == [0.0, 0.0, 0.0]


def test_without_a_score_of_any_end_there_is_no_weighted_vote():
    rows = stop_curve([replace(one, score=None) for one in (A, B, C)], (0.25,), subsets=5)
    assert [("majority" in row, "weighted_majority" in row) for row in rows] == [(True, False)] * 2
    ended_but_for_those_without = [D, replace(A, row=1, prefix_scores=[0.1, 0.1])]
    assert all(
        "weighted_majority" in row for row in stop_curve(ended_but_for_those_without, (0.5,), subsets=5)
    )


def test_a_score_of_exactly_the_threshold_does_not_end():
    assert [row["ended"] for row in stop_curve([A, C], (0.2,), subsets=5)] == [0.0, 0.0]


def test_the_change_has_an_interval_over_problems():
    """In half of the problems the one right response is ended: accuracy falls from 1 to 0 there."""
    records = [record(0, True, 10, {5: 0.1 if row % 2 else 0.9}, 0.9, row=row) for row in range(40)]
    change = stop_curve(records, (0.5,), subsets=5)[1]["accuracy"]
    assert change["change"] == -0.5 and -0.7 < change["low"] < -0.5 < change["high"] < -0.3


def test_of_ended_generation_tokens_and_places_are_counted():
    records = [
        A,
        record(1, False, 5, {5: 0.1}, None, reason="ended"),
        record(2, False, 10, {5: 0.6, 10: 0.15}, None, reason="ended"),
    ]
    found = ended_early(records, 0.2, ordinal=False)
    assert (found["responses"], found["ended"], found["tokens"], found["tokens_of_ended"]) == (3, 2, 27, 15)
    assert found["by_position"] == [
        {"first": 5, "last": 5, "responses": 3, "ended": 1},
        {"first": 10, "last": 10, "responses": 2, "ended": 1},
    ]


def test_thresholds_are_read_from_the_command_line():
    assert StopBelow.parse(None, end_early=False) == StopBelow(DEFAULT_THRESHOLDS)
    assert StopBelow.parse("0.3,0.1, -0.2", end_early=False).thresholds == (-0.2, 0.1, 0.3)
    assert StopBelow.parse("0.3", end_early=True) == StopBelow((0.3,), True)
    for text, end_early, message in (
        ("a", False, "expected numbers"),
        ("nan", False, "expected numbers"),
        ("", False, "expected numbers"),
        ("0.1,0.2", True, "give one"),
        (None, True, "with --stop-below"),
    ):
        with pytest.raises(TestTimeError, match=message):
            StopBelow.parse(text, end_early=end_early)


def test_without_a_prefix_there_are_no_rows():
    short = record(0, True, 3, {}, 0.9)
    detail = auroc_by_position([short], ordinal=False)
    assert detail["by_position"] == [] and math.isnan(detail["end"]["auroc"])
    assert stop_curve([short], (0.9,), subsets=5)[1]["tokens_saved"] == 0.0


def test_the_report_says_what_a_pair_reads_and_its_figure_shows_an_inverted_score(tmp_path, monkeypatch):
    records = [replace(record(0, i % 2 == 0, 12, {5: 0.9 * (i % 2)}, 0.5), row=i) for i in range(8)]
    pair = PrefixRule(ScoreRule((3, 4), None, 0.1, kind="pair_sigmoid"), every=5, name="pair")
    prefix = json.loads(json.dumps(prefix_detail(records, pair, StopBelow((0.2,)))))
    assert prefix["by_position"][0]["auroc"] == 0.0
    drawn = []
    monkeypatch.setattr(prefixes, "save", lambda figure, path, *_: drawn.append(figure.axes[0].get_ylim()))
    detail = {"curves": {"average": {"mean": [0.5]}}, "prefix": prefix}
    text = "\n".join(prefix_section("test", detail, tmp_path))
    assert "token 3, 4, pair_sigmoid" in text and "ref_logprob" not in text
    ((low, high),) = drawn
    assert low <= 0.0 and high > 1.0

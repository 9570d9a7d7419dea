"""Scores that others gave: read from files, joined to evaluations, judged; and every way in which a file is wrong."""

import json
import math
import re
from dataclasses import asdict

import pytest
from test_evaluation_detail import record, right

from megatron_laser.algorithms.metrics import verification_metrics
from megatron_laser.evaluation.benchmarks.settings import Benchmark
from megatron_laser.evaluation.summary import summarize
from megatron_laser.rewards import GradingPool
from megatron_laser.testtime import TestTimeError
from megatron_laser.testtime.finished import FinishedBenchmark, read_finished
from megatron_laser.testtime.score_report import write_score_report
from megatron_laser.testtime.scored_rows import ScoreColumn, join_scores, read_scored_file

BENCHMARK = Benchmark(
    *("amc", None, 2, 8, 8, None, 1.0, 1.0, "problem", "answer", "id", "", False, {}, "", "math_verify", 1)
)


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=1) as pool:
        yield pool


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finished(folder, records, name="amc"):
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = sorted({one.row for one in records})
    write(folder / name / "problems.jsonl", [{"row": row, "id": f"p{row}"} for row in rows])
    return FinishedBenchmark(name, folder / name, BENCHMARK, records, "model")


RECORDS = [right(0, 0, score=0.2), record(0, 1, score=0.9), right(1, 0), record(1, 1)]


def test_rows_with_an_answer_are_graded_and_equal_answers_vote_together(pool, tmp_path):
    rows = [
        {"id": "a", "response": "\\boxed{0.5}", "answer": "1/2", "score": 0.9},
        {"id": "a", "response": "\\boxed{\\frac{2}{4}}", "answer": "1/2", "score": 0.4},
        {"id": "a", "response": "\\boxed{3}", "answer": "1/2", "score": 0.6},
        {"id": "b", "response": "none", "answer": 7, "score": None},
    ]
    found = read_scored_file(write(tmp_path / "rm.jsonl", rows), ScoreColumn(), pool)
    (records,) = found.benchmarks.values()
    assert [(one.row, one.sample, one.right) for one in records] == [
        *((0, 0, True), (0, 1, True), (0, 2, False), (1, 0, False))
    ]
    assert [one.answer_class for one in records] == [0, 0, 1, None]
    assert (found.lengths_known, found.boxes_known, found.own_scores) == (False, True, False)
    summary = summarize(records, missing_is_zero=True)
    assert summary["accuracy"] == (2 / 3 + 0) / 2  # of problems, which differ in how many responses they have
    assert "majority" in summary and "logprob_majority" not in summary
    expected = verification_metrics([0.9, 0.4, 0.6], [1, 1, 0])
    assert summary["self_reward_f1"] == expected.f1 and summary["self_reward_auroc"] == expected.auroc
    released = verification_metrics([0.9, 0.4, 0.6, 0.0], [1, 1, 0, 0])
    assert summary["released_self_reward_accuracy_incorrect"] == released.accuracy_incorrect == 0.5


def test_labels_of_the_file_are_taken_as_they_are_and_logits_can_be_mapped(pool, tmp_path):
    rows = [{"row": i, "label": i % 2, "rm": value} for i, value in enumerate([-800.0, 2.0, 0.5, -1.0])]
    path = write(tmp_path / "rm.jsonl", rows)
    found = read_scored_file(path, ScoreColumn("rm", sigmoid=True), pool)
    (records,) = found.benchmarks.values()
    sigmoids = [0.0, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1))]
    assert [one.score for one in records] == pytest.approx(sigmoids)
    results = write_score_report(
        found.benchmarks,
        tmp_path / "out",
        judged="rm",
        threshold=0.7,
        missing_is_zero=True,
        lengths_known=found.lengths_known,
        boxes_known=found.boxes_known,
    )
    summary = results["benchmarks"]["rm"]["summary"]
    assert summary["self_reward_f1"] == verification_metrics(sigmoids, [0, 1, 0, 1], threshold=0.7).f1
    # no text: nobody knows which responses have a box, or how long they are
    assert math.isnan(summary["released_self_reward_f1"]) and math.isnan(summary["length_auroc"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "called right above 0.7; 0 of 4 scores are outside [0, 1]" in report and "By length" not in report


def test_the_rows_of_an_evaluation_give_its_own_summary(pool, tmp_path):
    records = [*RECORDS, right(2, 0, score=None, finish_reason="length", forced_score=0.7), record(2, 1)]
    path = write(tmp_path / "records.jsonl", [asdict(one) for one in records])
    found = read_scored_file(path, ScoreColumn(), pool)
    assert found.own_scores and found.lengths_known
    (again,) = found.benchmarks.values()
    assert summarize(again) == pytest.approx(summarize(records), nan_ok=True, abs=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"row": 0, "label": 1}, r"rm.jsonl:2: no `score`; a response without a score has null there"),
        ({"row": 0, "label": 1, "score": math.nan}, r"rm.jsonl:2: `score` is nan; expected a finite number"),
        ({"row": 0, "label": 1, "score": "0.5"}, "`score` is '0.5'"),
        ({"row": 0, "label": 1, "score": True}, "`score` is True"),
        ({"label": 1, "score": 0.5}, "names no problem; expected one of row, id, problem"),
        ({"row": 0, "score": 0.5}, "no label; expected `reward`"),
        ({"row": 0, "score": 0.5, "response": "x"}, "no label; expected `reward`"),
        ({"row": 0, "score": 0.5, "reward": 2}, "`reward` is 2; expected a number from 0"),
        ({"row": 9, "sample": 0, "score": 0.5, "reward": 1}, r"response 0 .* stands in .*rm.jsonl:1 already"),
        ({"row": 0, "sample": -1, "score": 0.5, "reward": 1}, "`sample` is -1"),
        ({"row": 0, "score": 0.5, "reward": 1, "outcome": "fine"}, "`outcome` is 'fine'"),
        ([1], "expected a JSON object"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(pool, tmp_path, row, message):
    path = write(tmp_path / "rm.jsonl", [{"row": 9, "label": 1, "score": 0.5}, row])
    with pytest.raises(TestTimeError, match=message):
        read_scored_file(path, ScoreColumn(), pool)


def test_scores_of_another_judge_take_the_place_of_an_evaluations_own(tmp_path):
    rows = [
        {"id": f"p{row}", "sample": sample, "score": 1.0 - row - sample}
        for row in (1, 0)
        for sample in (0, 1)
    ]
    joined = join_scores([finished(tmp_path, RECORDS)], write(tmp_path / "rm.jsonl", rows), ScoreColumn())
    assert [one.score for one in joined["amc"]] == [1.0, 0.0, 0.0, -1.0]
    assert [one.right for one in joined["amc"]] == [True, False, True, False]
    assert summarize(joined["amc"])["self_reward_f1"] == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert RECORDS[0].score == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"1 of the 4 responses have no row \(amc row 1 sample 1\)"),
        (lambda rows: [*rows, rows[0]], r"rm.jsonl:5: .* has a score from .*rm.jsonl:1 already"),
        (lambda rows: [*rows, {"row": 7, "sample": 0, "score": 1}], "amc has no response with `row` 7"),
        (lambda rows: [*rows, {"id": "q", "sample": 0, "score": 1}], r"`row` None \(`id` 'q'\)"),
        (
            lambda rows: [{**rows[0], "benchmark": "aime"}, *rows[1:]],
            "`benchmark` is 'aime'; expected one of amc",
        ),
        (lambda rows: [{**rows[0], "score": math.inf}, *rows[1:]], "`score` is inf"),
    ],
)
def test_scores_that_do_not_fit_the_evaluation_are_refused(tmp_path, change, message):
    rows = [{"row": row, "sample": sample, "score": 0.5} for row in (0, 1) for sample in (0, 1)]
    path = write(tmp_path / "rm.jsonl", change(rows))
    with pytest.raises(TestTimeError, match=message):
        join_scores([finished(tmp_path, RECORDS)], path, ScoreColumn())


def test_of_several_benchmarks_a_row_has_to_say_which(tmp_path):
    two = [finished(tmp_path, RECORDS[:2]), finished(tmp_path, RECORDS[2:], "aime")]
    path = write(tmp_path / "rm.jsonl", [{"row": 0, "sample": 0, "score": 0.5}])
    with pytest.raises(TestTimeError, match="`benchmark` is None; expected one of amc, aime"):
        join_scores(two, path, ScoreColumn())


def test_a_folder_without_results_is_no_finished_evaluation(tmp_path):
    with pytest.raises(TestTimeError, match=re.escape("has no results.json")):
        read_finished(tmp_path)

"""The grading check on an excerpt of MATH500's answers and some that are easily confused."""

import sys

import pytest
from helpers.source_tree import ROOT

from megatron_laser.data import read_rows
from megatron_laser.rewards import GradingPool

sys.path.insert(0, str(ROOT / "tools"))
import check_grading as tool

FILE = ROOT / "tests" / "unit" / "data" / "gold_answers.jsonl"


@pytest.fixture(scope="module")
def golds():
    return [row.answer for row in read_rows(FILE, prompt_key="problem", answer_key="answer")]


def test_every_answer_is_right_about_itself_in_every_wrapping(golds):
    lines, fine = tool.self_grades(golds)
    assert fine, lines
    assert [line for line in lines if "not right" in line] == []


def test_no_answer_is_right_about_another_problem_without_a_reason(golds):
    pairs = tool.shuffled_pairs(golds, 1)
    assert len(pairs) == len(golds)
    with GradingPool(workers=2) as pool:
        lines, unexplained, count = tool.false_rights(pool, pairs)
        assert count == len(pairs)
        assert unexplained == 0, lines
        # the equation is not the answer 0, and the check would say so
        found, _, _ = tool.false_rights(
            pool, [("\\boxed{5x - 7y + 11z + 4 = 0}", "0"), ("\\boxed{0.5}", "\\frac12")]
        )
    assert len(found) == 1 and "none known" in found[0]


def test_a_wrong_answer_is_named():
    lines, fine = tool.self_grades(["5", "\\frac{1}{"])
    assert not fine and any("\\frac{1}{" in line and "unparsable" in line for line in lines)


def test_known_reasons_are_told_apart():
    assert tool.reason("\\frac14", "\\frac{1}{4}") == "spelling"
    assert "units" in tool.reason("36", "36^\\circ")
    assert "set" in tool.reason("1,-2", "-2,1")
    assert "right side" in tool.reason("x=5", "5")
    assert tool.reason("0.5", "1/2") == ""

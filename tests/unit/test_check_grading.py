"""The grading check on an excerpt of MATH500's answers and some that are easily confused."""

import sys
from collections import Counter

import pytest
from helpers.source_tree import ROOT

from megatron_laser.data import read_rows
from megatron_laser.rewards import GradingPool

sys.path.insert(0, str(ROOT / "tools"))
import check_grading as tool
from spellings import FORMS, Pair, table
from spellings.respell import as_a_model, respellings

FILE = ROOT / "tests" / "unit" / "data" / "gold_answers.jsonl"


@pytest.fixture(scope="module")
def golds():
    return [row.answer for row in read_rows(FILE, prompt_key="problem", answer_key="answer")]


def test_the_generator_gives_200_pairs_of_each_kind_and_10_of_every_form():
    pairs = table()
    assert len(pairs) == 400 and sum(pair.same for pair in pairs) == 200
    assert len(FORMS) == 16
    shares = Counter((pair.form, pair.same) for pair in pairs)
    assert min(shares[form, same] for form in FORMS for same in (True, False)) >= 10
    assert all(pair.answer != pair.gold for pair in pairs)
    assert len({(pair.answer, pair.gold) for pair in pairs}) > 390
    assert table() == pairs and table(1) != pairs


def test_a_reference_is_respelt_and_put_into_a_sentence():
    assert respellings("\\frac{1}{2}")["a slash"] == "1/2"
    assert respellings("1234")["thin spaces between digits"] == "1\\,234"
    assert respellings("1,-2")["the other order"] == "-2, 1"
    assert all(respellings(gold) for gold in ("5", "x+1", "\\text{east}"))
    assert as_a_model("5", 0).endswith("$\\boxed{5}$.")


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


def test_pairs_are_counted_both_ways_and_named():
    pairs = [
        Pair("slash", "1/2", "0.5", True),
        Pair("slash", "1/2", "0.5", False),
        Pair("slash", "1/2", "0.6", True),
    ]
    with GradingPool(workers=1) as pool:
        counts, split = tool.spelt_grades(pool, pairs)
    assert split == []
    assert counts["slash"].row("slash") == "| slash | 4 | 2 | 2 | 2 | 0 |"
    assert len(counts["slash"].names) == 4 and not tool.limits_kept(counts.values())


def test_a_reference_that_nothing_equals_is_named():
    with GradingPool(workers=1) as pool:
        counts, unreachable = tool.respelt_grades(pool, ["5", "\\frac{1}{"])
    assert unreachable == ["\\frac{1}{"]
    assert counts["a decimal"].row("x") == "| x | 1 | 0 | 0 | 0 | 0 |"


def test_known_reasons_are_told_apart():
    assert tool.reason("\\frac14", "\\frac{1}{4}") == "spelling"
    assert "units" in tool.reason("36", "36^\\circ")
    assert "order" in tool.reason("1,-2", "-2,1")
    assert tool.reason("(-2,1)", "-2,1") == tool.reason("204_5", "204") == ""
    assert "right side" in tool.reason("x=5", "5")
    assert tool.reason("0.5", "1/2") == ""

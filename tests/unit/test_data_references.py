"""Reference answers: known forms are extracted, numbers keep their value, and what nothing can equal is said."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from megatron_laser.data import DataError, Row, read_rows, reference_findings
from megatron_laser.data.findings import log_warnings
from megatron_laser.data.references import (
    BOX,
    EXPONENT,
    HASHES,
    LIST,
    Reference,
    number_text,
    read_reference,
    why_unequal,
)
from megatron_laser.rewards import grade_math, is_math_verify

PROSE = "The function is continuous at every point but one."


@pytest.mark.parametrize(
    ("value", "text", "taken_from"),
    [
        ("827", "827", ""),
        (" 827\n", "827", ""),
        ("Eight, two and seven do.\n#### 827", "827", HASHES),
        ("so #### $\\frac{1}{2}$", "$\\frac{1}{2}$", HASHES),
        ("#### Step 1\nAdd.\n#### Step 2\nSo it is \\boxed{5}.", "5", BOX),
        ("First \\boxed{4}, then \\[\\boxed{\\frac{1}{2}}\\]", "\\frac{1}{2}", BOX),
        ("$\\boxed{5}$", "5", ""),
        (["204"], "204", LIST),
        ([204], "204", LIST),
        ([["#### 3"]], "3", LIST),
        ('["34"]', "34", LIST),
        (r"['\\frac{1}{2}']", r"\frac{1}{2}", LIST),
        (r'["\frac{1}{2}"]', r"\frac{1}{2}", LIST),
        ('["1", "2"]', '["1", "2"]', ""),
        ("[1, 2]", "[1, 2]", ""),
        ("1e-07", "0.0000001", EXPONENT),
        ("-1.50E3", "-1500", EXPONENT),
        ("3e", "3e", ""),
        (1e-7, "0.0000001", ""),
        (7, "7", ""),
        (["1", "2"], "", ""),
        ([], "", ""),
        (None, "", ""),
        (True, "", ""),
        ({"a": 1}, "", ""),
        (float("inf"), "", ""),
        ("  ", "", ""),
    ],
)
def test_an_answer_is_taken_out_of_its_form(value: Any, text: str, taken_from: str) -> None:
    assert read_reference(value) == Reference(text, taken_from)
    if text:
        assert read_reference(text).text == text or taken_from == ""  # extracting twice changes nothing


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (204.0, "204"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e22, "10000000000000000000000"),
        (5e-324, "5 \\times 10^{-324}"),
        (1.5e300, "1.5 \\times 10^{300}"),
        (Decimal("2.50"), "2.5"),
        (Decimal("-0.00120"), "-0.0012"),
        (Decimal("1E+3"), "1000"),
        (Decimal("3.14159265358979323846"), "3.14159265358979323846"),
        (Decimal("1e999999999"), "1 \\times 10^{999999999}"),
        (Decimal("NaN"), None),
        (True, None),
        ("5", None),
    ],
)
def test_numbers_are_written_with_all_their_digits_and_no_exponent(value: Any, text: str | None) -> None:
    assert number_text(value) == text


def test_numbers_of_json_keep_the_digits_that_they_are_written_with(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    numbers = ["3.14159265358979323846", "1e-07", "2.50", "[0.5]", "1E400", "12345678901234567890"]
    path.write_text("".join(f'{{"problem": "p", "answer": {number}}}\n' for number in numbers))
    rows = read_rows(path, prompt_key="problem", answer_key="answer")
    assert [row.answer for row in rows] == [
        "3.14159265358979323846",
        "0.0000001",
        "2.5",
        "0.5",
        "1 \\times 10^{400}",
        "12345678901234567890",
    ]
    assert [row.taken_from for row in rows] == ["", "", "", LIST, "", ""]


def test_a_reward_function_of_the_users_own_gets_the_column_as_it_is(tmp_path: Path) -> None:
    values = ["work\n#### 827 ", "", {"tests": ["f(1) == 1.5", "é"], "x": 0.5}, ["a"], True, 1e-7]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"problem": "p", "answer": value}) + "\n" for value in values))
    rows = read_rows(path, prompt_key="problem", answer_key="answer", mathematics=False)
    assert [row.answer for row in rows] == [
        "work\n#### 827 ",
        "",
        '{"tests": ["f(1) == 1.5", "é"], "x": 0.5}',
        '["a"]',
        "true",
        "0.0000001",
    ]
    path.write_text('{"problem": "p", "answer": null}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'answer'"):
        read_rows(path, prompt_key="problem", answer_key="answer", mathematics=False)
    assert is_math_verify("megatron_laser.rewards:grade_math") and not is_math_verify("my_rewards:grade")


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (PROSE, "prose"),
        (r"\text{" + PROSE + "}", "prose"),
        ("x = 1\ny = 2", "several lines"),
        ("First this.\n\nThen 5", "several lines"),
        ("$$\nx = 1\n$$", ""),
        ("\\{1, 2,\n3\\}", ""),
        ("\\left(1,\n2\\right)", ""),
        ("\\frac{1}{2} +\n\\sqrt{3}", ""),
        (r"\frac{1}{2", "text that no box can hold (braces that do not match, or too long)"),
        ("5\\", "text that no box can hold (braces that do not match, or too long)"),
        ("1+" * 1500 + "1", "text that no box can hold (braces that do not match, or too long)"),
        ("N/A", "a placeholder"),
        ("827", ""),
        (r"\text{Monday}", ""),
        ("no real solutions", ""),
        ("x = 5 or x = 6", ""),
        (r"\left\{ 1, 2 \right\}", ""),
        ("\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}", ""),
        (r"\frac{\sqrt{2}}{\sin\alpha\cos\beta\tan\gamma\log\delta}", ""),
    ],
)
def test_what_no_response_can_equal_is_told_from_answers(reference: str, why: str) -> None:
    assert why_unequal(reference) == why


def test_a_box_that_holds_what_is_called_an_answer_is_right() -> None:
    gold = Path(__file__).parent / "data" / "gold_answers.jsonl"
    rows = read_rows(gold, prompt_key="problem", answer_key="answer")
    assert [row.answer for row in rows if why_unequal(row.answer)] == []
    for row in rows:
        assert grade_math(f"\\boxed{{{row.answer}}}", row.answer).outcome == "correct", row


def test_a_worked_solution_is_graded_by_its_end() -> None:
    solution = "Eight, two and seven do.\n#### 827"
    assert grade_math(r"\boxed{827}", solution).outcome == "correct"
    assert grade_math(r"\boxed{828}", solution).outcome == "wrong"


def rows(*answers: str) -> list[Row]:
    found = []
    for number, answer in enumerate(answers):
        reference = read_reference(answer)
        found.append(Row(number, "p", reference.text, f"a.jsonl:{number + 1}", reference.taken_from))
    return found


def test_references_are_looked_at_with_counts_and_places() -> None:
    (fine,) = reference_findings(rows("1", "-2.5"))
    assert (fine.topic, fine.level) == ("references", "ok")
    taken, some = reference_findings(rows("1", "so\n#### 2", "3", PROSE))
    assert taken.level == "note" and taken.examples == ("a.jsonl:2: '2'",)
    assert taken.text == f"data.train: 1 of 4 references were taken out of {HASHES} (1)"
    assert some.level == "warning" and some.examples == (f"a.jsonl:4: {PROSE!r}",)
    assert some.text == "data.train: no response can equal 1 of 4 references: prose (1)"
    (most,) = reference_findings(rows(PROSE, "x\ny", "5"), name="data.test")
    assert most.level == "error" and "data.test: no response can equal 2 of 3" in most.text
    with pytest.raises(
        DataError, match=r"equal 2 of 3 references: prose \(1\), several lines \(1\) \(a\.jsonl:1"
    ):
        log_warnings([fine, most])


def test_the_grader_is_asked_about_what_is_no_number() -> None:
    """A process of its own, and not asked where all is plain."""
    (finding,) = reference_findings(rows("7", r"\frac{1}{2}", "@@", "§§"))
    assert finding.level == "warning" and finding.examples == ("a.jsonl:3: '@@'", "a.jsonl:4: '§§'")
    assert "2 of 3 references that were tried are no mathematics to the grader" in finding.text

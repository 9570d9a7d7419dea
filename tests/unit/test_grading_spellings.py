"""Right answers in another spelling and near misses: generated, reported, and what was found beside them."""

from __future__ import annotations

import itertools
import random
import sys
import time

import pytest
from helpers import answer_pairs
from helpers.source_tree import ROOT

from megatron_laser.rewards import answers_equal, equivalence_classes, grade_math, normalize_answer
from megatron_laser.rewards.mathematics.grading import compare_answers

sys.path.insert(0, str(ROOT / "tools"))
from spellings import FORMS, Pair, table

PAIRS = table()


def outcome(answer: str, gold: str) -> str:
    return grade_math(f"\\boxed{{{answer}}}", gold).outcome


@pytest.mark.parametrize("form", FORMS)
def test_generated_pairs_are_graded_by_their_value_both_ways_round(form: str) -> None:
    """One false wrong in 50 would be allowed; there is none, and nothing is undecided."""
    wrong = [
        (answer, gold, outcome(answer, gold))
        for pair in PAIRS
        if pair.form == form
        for answer, gold in ((pair.answer, pair.gold), (pair.gold, pair.answer))
        if outcome(answer, gold) != ("correct" if pair.same else "wrong")
    ]
    assert wrong == []


def test_pairs_of_another_seed_keep_the_limits() -> None:
    grades = [(pair, outcome(pair.answer, pair.gold)) for pair in table(seed=12345)]
    assert [pair for pair, grade in grades if not pair.same and grade == "correct"] == []
    assert sum(pair.same and grade == "wrong" for pair, grade in grades) <= 0.02 * 200
    assert sum(grade not in ("correct", "wrong") for _, grade in grades) <= 0.02 * 400


REPORTED_DIFFERENT = [
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{20!}", r"\frac{1}{19!}"),
    (r"2^{-98}", r"2^{-99}"),
    (r"6.6\times 10^{-34}", r"1.6\times 10^{-19}"),
    ("0.0000001", "0.0000002"),
    ("0.5", "0.5000001"),
    (r"\frac{1}{3 \cdot 2^{2006}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}"),
    ("2516_7", "2516_8"),
    ("6=5", "5"),
    ("(-2,1)", "1,-2"),
    # found beside them
    ("R", "r"),  # the parser's lower case
    ("2t", "2"),  # its units t, h, c, s, l
    ("3h", "3"),
    ("x'", "x"),  # it drops primes
    ("A1_{16}", "A"),  # ... and the subscripts of numbers
    (r"\log_2 3", r"\ln 3"),  # SymPy the base of a logarithm that is not evaluated
    ("x=1,y=2", "x=2,y=1"),
    ("2x=10", "10"),
    ("2x+3y=5", "5"),
    ("x+y=5", "5"),
    ("x+y=5", "x-y=5"),
    (r"\{\emptyset\}", r"\emptyset"),
    ("1,1,2", "1,2"),
    (r"3 \text{ million}", "3"),
    (r"12~\mathrm{cm}", r"12~\mathrm{m}"),
    (r"12~\mathrm{cm}", r"12~\mathrm{cm}^2"),
    (r"36^\circ", r"\$36"),
    ("50\\%", "0.5"),
    ("y>2x", r"y\ge 2x"),
    (r"\sqrt{10^{80}+1}", "10^{40}"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"\sqrt{x^2}", "x"),
    ("(1,2)", "[1,2]"),
    ("(1,234)", "1234"),
    (r"\pi", r"\frac{22}{7}"),
    (r"\text{Amy}", r"\text{May}"),
    (r"\frac123", r"\frac{1}{23}"),
    (r"\pm 4", "4"),
    (r"\{1,2\}", "(1,2)"),
    ("1.00000001", "1"),
    ("4.0000001", r"\sqrt{16}"),
    ("0.5000001", r"\cos 60^\circ"),
    (r"\alpha=1, \beta=2", r"\alpha=2, \beta=1"),
    ("AB=3, AC=4", "AB=4, AC=3"),
    ("f(1)=2, f(2)=3", "f(1)=3, f(2)=2"),
    (r"30^\circ C", r"30^\circ F"),
    (r"1,000\text{ cm}", "1"),
    (r"12, 12\text{ cm}", r"12\text{ m}, 12\text{ m}"),
    ("x(x+1)=6", "x(x+2)=6"),
    *answer_pairs.DIFFERENT,
]
REPORTED_SAME = [
    (r"x \ge 2", r"[2,\infty)"),
    (r"2 \le x < 3", "[2,3)"),
    (r"\varnothing", r"\emptyset"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"1\,234", "1234"),
    ("1.5e3", "1500"),
    (r"\cos 60^\circ", "0.5"),
    ("45°", "45"),
    ("½", "0.5"),
    ("√2", r"\sqrt{2}"),
    ("5.", "5"),
    (r"12~\mathrm{cm}", "12"),
    # found beside them
    ("i^2", "-1"),
    (r"e^{i\pi}", "-1"),
    ("2x<10", "x<5"),
    (r"\mathbb{R}\setminus\{2\}", r"x\ne 2"),
    (r"[1,2]\cup[2,3]", "[1,3]"),
    ("x>1, x<3", "(1,3)"),
    ("x=2,y=3", "(2,3)"),
    ("x_1=2, x_2=3", "3,2"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\{x \mid x>2\}", r"(2,\infty)"),
    ("2x-y+3=0", "y=2x+3"),
    ("2x^2+2y^2=50", "x^2+y^2=25"),
    ("2x - y + 1 < 0", "y > 2x+1"),
    (r"3.5\text{ million dollars}", "3500000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("1 1/2", "1.5"),
    (r"12 \text{ square inches}", r"12\mbox{ inches}^2"),
    (r"60\,\mathrm{km/h}", r"60 \text{ km}/\text{h}"),
    (r"60 \text{ miles per hour}", "60"),
    (r"x = 12\text{ cm}", "12 centimeters"),
    (r"45^\circ", r"45\text{ degrees}"),
    (r"\sum_{n=1}^{10} n^2", "385"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
    (r"\prod_{k=1}^{6} k", "720"),
    (r"\int_0^1 x dx", "0.5"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"-\infty < x < \infty", r"\mathbb{R}"),
    (r"\$32,\!348", "32348"),
    (r"P(X=2)=\frac{1}{4}", "0.25"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"\sqrt{2}", "1.41421356"),  # a decimal that rounds an irrational number
    (r"2516 \text{ base } 8", "2516_8"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2.0\end{bmatrix}"),
    (r"\text{No solution.}", r"\text{no solution}"),
    (r"1,000\text{ dollars}", "1000"),
    (r"2,500~\mathrm{m}", "2500"),
    (r"1,234\sqrt{2}", r"1234\sqrt{2}"),
    (r"(-\infty,1)\text{ or }(3,\infty)", r"(-\infty,1)\cup(3,\infty)"),
    (r"30^\circ C", r"30^\circ"),
    ("a_1=1, b_1=2", "b_1=2, a_1=1"),
    (r"12, 12\text{ cm}", r"12, 12\text{ m}"),
    ("a(b+c)=5", "5"),
    ("x_1=2, x_2=3", "3,2"),
    *answer_pairs.SAME,
    ("x > 1 1/2", "x > 1.5"),
]
UNDECIDED = [
    ("9^{9^{9^9}}", "5"),
    (r"\binom{10^9}{10^8}", r"\binom{10^9}{10^8}+1"),
    ("7^{100000}-7^{99999}", "7^{100000}-7^{99999}+1"),
    (r"5 \text{ or more}", "5"),
    ("A^T", "A"),
    (r"\frac12 @@ foo", "0.5"),  # math-verify would take the fraction out of it
    ("garbage = 5", "6"),
    (r"0.333\ldots", r"\frac{1}{3}"),
    ("x^2=4", "2"),
    ("x>1 \\text{ and } y<3", "(1,3)"),
    ("n(n+1)=6", "6"),
    ("x<-2, x>2", r"\emptyset"),
    (r"3\text{ p.m.}", r"3\text{ a.m.}"),
    (r"7\text{ tenths}", "7"),
    (r"\cup".join(["1"] * 210 + ["2"]), "1"),
    *answer_pairs.UNDECIDED,
    ("x > 12_7", r"(12,\infty)"),
    (r"x > 5\text{ or more}", r"(5,\infty)"),
]


@pytest.mark.parametrize(("answer", "gold"), REPORTED_DIFFERENT)
def test_different_values_are_wrong(answer: str, gold: str) -> None:
    assert outcome(answer, gold) == outcome(gold, answer) == "wrong"


@pytest.mark.parametrize(("answer", "gold"), REPORTED_SAME)
def test_other_spellings_are_right(answer: str, gold: str) -> None:
    assert outcome(answer, gold) == outcome(gold, answer) == "correct"


@pytest.mark.parametrize(("answer", "gold"), UNDECIDED)
def test_what_cannot_be_decided_is_neither(answer: str, gold: str) -> None:
    assert outcome(answer, gold) == outcome(gold, answer) == "unparsable"
    assert compare_answers(answer, gold) is None and not answers_equal(answer, gold)


def test_grades_and_votes_are_one_equivalence() -> None:
    """Symmetric, transitive, and a vote's classes are what grades call equal; over all sorts of answers at once."""
    pairs = [(pair.answer, pair.gold) for pair in random.Random(0).sample(PAIRS, 16)]
    pairs += random.Random(1).sample(REPORTED_DIFFERENT + REPORTED_SAME + UNDECIDED, 16)
    answers = sorted({normalize_answer(answer) for pair in pairs for answer in pair})
    same = {}
    for left, right in itertools.product(answers, repeat=2):
        same[left, right] = compare_answers(left, right)
        assert answers_equal(left, right) == (outcome(left, right) == "correct") == bool(same[left, right])
    for left, right in itertools.combinations(answers, 2):
        assert same[left, right] == same[right, left], (left, right)
        if same[left, right]:
            assert all(bool(same[left, other]) == bool(same[right, other]) for other in answers), (
                left,
                right,
            )


def test_votes_over_many_spellings_are_the_classes_of_their_values() -> None:
    spellings = [
        "0.5",
        "½",
        r"\frac{1}{2}",
        "5e-1",
        "0.50.",
        r"\frac{2}{4}",
        "1/2",
        "x",
        "–2",
        "-2",
        "x",
        "2",
    ]
    assert equivalence_classes(spellings) == [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 1, 3]


HOSTILE = [
    "9^{9^{9}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "x^{9^{9^9}}",
    "(x+1)^{10^6}",
    "((999!)!)!",
    "(10^9)!",
    "10^9!",
    r"\binom{1000000}{500000}",
    r"\sum_{n=1}^{10^{12}} n^n",
    r"\prod_{n=1}^{10^{12}} n",
    r"\sqrt{" * 300 + "2" + "}" * 300,
    "(" * 900 + "1" + ")" * 900,
    "1e999999",
    "10^{-10^{10}}",
    "0.\\overline{" + "3" * 1900 + "}",
    "√" * 1900,
    "√(" * 900,
    "½" * 1000,
    "|" * 1900,
    "=" * 1900,
    r"\cup" * 600,
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10^9}",
    "__import__('os').system('false')",
    "e^{e^{e^{e^{e}}}}",
    "n^{n^{n^n}}=0",
    "(y+1)^{300}=x",
    "x>9^{9^9}",
    "[0,9^{9^9}]",
    "5" + "!" * 1000,
    "3" + "^{3" * 38 + "}" * 38,
    r"\{" * 38 + "1" + r"\}" * 38,
    "1 and " * 300 + "2",
    "1{,}000" * 250,
    "(x+y+z+1)^{60}=0",
    r"+".join(rf"\frac{{1}}{{y+{k}x}}" for k in range(1, 40)) + "=0",
    r"\sum_{k=1}^{n}\sum_{j=1}^{k}\frac{j}{k+n}",
    r"\prod_{k=2}^{\infty}(1-\frac{1}{k^2})",
    r"\int \frac{1}{x^{5}+x+1}dx",
    r"\det\begin{pmatrix}"
    + r"\\".join("&".join(f"a_{{{i}{j}}}" for j in range(8)) for i in range(8))
    + r"\end{pmatrix}",
    "x'" * 995,
    "\ud800" * 1000,
    "\x00" * 1000,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: text[:12].encode("ascii", "replace").decode())
def test_hostile_answers_cost_little_even_without_a_deadline(hostile: str) -> None:
    start = time.perf_counter()
    assert outcome(hostile, r"x+\sqrt{2}") in ("wrong", "unparsable")
    assert outcome(hostile, "5") in ("wrong", "unparsable")
    assert time.perf_counter() - start < 5.0  # they take below 0.5 s on a free core


def test_the_generator_is_not_the_grader() -> None:
    assert isinstance(PAIRS[0], Pair)
    for module in (ROOT / "tools" / "spellings").glob("*.py"):
        assert "megatron_laser" not in module.read_text(encoding="utf-8")


@pytest.mark.parametrize("answer", ["\\left" * 20_000 + "(", "\\" * 50_000 + "!" * 50_000])
def test_a_long_answer_is_not_normalised_pass_by_pass(answer: str) -> None:
    start = time.perf_counter()
    assert outcome("5", answer) in ("wrong", "unparsable")
    assert time.perf_counter() - start < 5.0  # at one mark per pass over all the text: 27 s

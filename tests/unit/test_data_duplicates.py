"""Which problems are the same: typesetting does not count, what changes a meaning does."""

import pytest

from megatron_laser.data.duplicates import comparable


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $1 + 1$?", "what is 1+1?"),
        (r"What is $1\,+\,1$?", "What is $1+1$?"),
        (r"Find $\dfrac{1}{2}$ of  x", r"find \frac{1}{2} of x"),
        (r"$\left( a \right)$", "(a)"),
        (r"\big( a \bigr)", "(a)"),
        (r"$\left\{ a \right.$", r"$\{a$"),
        (r"\[x\] and \(y\)", "$x$ and $y$"),
        ("2² + 12¹⁰", "2^{2} + 12^{10}"),
        ("2^2", "2^{ 2 }"),
        ("A\u00a0b\n c", "A b c"),
        ("x – 1 and “y”", 'x - 1 and "y"'),
        ("Ｘ＝１", "X=1"),
        ("Let f be.  Find x", "let f be. find x"),
    ],
)
def test_the_same_problem_typeset_otherwise(one, other):
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"A \rightarrow B", r"A \leftarrow B"),
        (r"A \leftrightarrow B", r"A \rightarrow B"),
        ("Find N if x = 2N and X = 3", "Find n if X = 2n and x = 3"),
        ("Find AB", "Find ab"),
        ("Find Arg z", "Find arg z"),
        (r"\Delta", r"\delta"),
        ("Compute 2² + 1", "Compute 22 + 1"),
        ("½ 2", "1/2 2"),
        ("x^{12}", "x^12"),
        ("1 2 3", "12 3"),
        ("$1$ $2$", "$12$"),
        (r"x \in t", r"x \int"),
        ("p and ~q", "p and q"),
        (r"a \\, b", r"a \, b"),
        (r"1 \\ 2", "1 2"),
        ("1 - 1", "1 + 1"),
        ("1.5", "15"),
    ],
)
def test_different_problems(one, other):
    assert comparable(one) != comparable(other)

r"""Finding the last \boxed{...}: what counts as the answer, and that hostile texts cost linear time."""

from __future__ import annotations

import time

import pytest

from megatron_laser.rewards import extract_answer, find_last_box, has_exactly_one_box, normalize_answer
from megatron_laser.rewards.mathematics.boxed import MAX_ANSWER_CHARS, gold_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed { 5 }", "5"),
        (r"\boxed 5.", "5"),
        (r"$\boxed 5$", "5"),
        (r"\boxed5", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{6} \fbox{7}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1,2\right.}", r"\{1,2\right."),
        (r"\boxed{$5$}", "5"),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"( 3, \frac{\pi}{2} )"),
        (r"\boxed{5} but wait, \boxed{12", "5"),
        (r"\boxed{5}, cut off: \boxed", "5"),
        (r"\boxedeqn{6}", None),
        (r"no box", None),
        (r"\boxed{}", None),
        (r"\boxed{5} \boxed{ }", None),
        (r"\boxed{12", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_no_box_is_told_from_a_box_that_cannot_be_read() -> None:
    assert find_last_box("5").state == "none"
    for text in (r"\boxed{", r"\boxed{}", r"\boxed{5", r"\boxed{" + "1" * (MAX_ANSWER_CHARS + 1) + "}"):
        assert find_last_box(text).state == "bad"


@pytest.mark.parametrize(
    "hostile",
    [
        r"\boxed{" + "{" * 10**6,
        r"\boxed{" + "{" * 10**6 + "5" + "}" * 10**6 + "}",
        r"\boxed{" * 200_000,
        r"\boxed{" * 100_000 + "5" + "}" * 100_000,
        r"\boxedno" * 200_000,
        r"\fbox" * 200_000,
        r"\boxed" + " " * 10**6,
        "\\" * 10**6 + "boxed{" + "}" * 10**6,
    ],
    ids=range(8),
)
def test_time_is_linear_in_a_hostile_text(hostile: str) -> None:
    start = time.perf_counter()
    find_last_box(hostile)
    has_exactly_one_box(hostile)
    assert time.perf_counter() - start < 2.0  # quadratic time would be hours


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        (" $ 5 $ ", "5"),
        (r"\(5\)", "5"),
        ("$$5$$", "5"),
        (r"\[ x \]", "x"),
        ("$3$ and $4$", "$3$ and $4$"),
        (r"\tfrac12", r"\frac12"),
        (r"\left[0,1\right)", "[0,1)"),
        (r"x \leftarrow y", r"x \leftarrow y"),
        (r"\dfraction", r"\dfraction"),
        ("1 \n  2", "1 2"),
        ("$", "$"),
        (r"\$5", r"\$5"),
        ("", ""),
    ],
)
def test_normalising_removes_spelling_only(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized
    assert normalize_answer(normalized) == normalized


def test_a_reference_may_be_plain_boxed_or_in_dollars() -> None:
    assert {gold_answer(text) for text in ("5", "$5$", r"\boxed{5}", r"thus \boxed{$5$}.")} == {"5"}


def test_the_format_check_wants_exactly_one_complete_box() -> None:
    assert has_exactly_one_box(r"so \boxed{5}")
    assert not has_exactly_one_box("5")
    assert not has_exactly_one_box(r"\boxed{5} \boxed{5}")
    assert not has_exactly_one_box(r"\boxed{5")

"""One trial of the reward function before a run: an error, a warning or all well, with the user's line."""

import logging

import pytest

from megatron_laser.rewards import RewardSpecError, trial, try_reward

CODE = """
import time
def right(response, answer): return float(answer in response)
def raises(response, answer): raise ValueError("my bug")
def none(response, answer): return None
def two(response, answer): return 2.0
def sleeps(response, answer): time.sleep(60)
def needs_a_box(response, answer): return float(response.split("boxed{")[1][:2] == answer)
def backwards(text, reference): return float(text in reference)
def slow(response, answer): time.sleep(0.4); return 1.0
from megatron_laser.rewards import Grade
def returns_timeout(response, answer): return Grade(0.0, "timeout")
"""


FAILS = ("raises", "none", "two", "sleeps", "returns_timeout")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(CODE)
    return path


@pytest.mark.parametrize(
    ("name", "level", "words"),
    [
        ("right", "ok", "mine.py:right gave 1 for the reference in a box, 0 without one, in "),
        ("raises", "error", "ValueError: my bug ({file}:4 in raises)"),
        ("none", "error", "not NoneType (None) ({file}:5)"),
        ("two", "error", "from 0 (wrong) to 1 (right), not 2.0 ({file}:6)"),
        ("sleeps", "error", "no answer within 0.5 s ({file}:7 in sleeps)"),
        ("needs_a_box", "warning", "IndexError: list index out of range ({file}:8 in needs_a_box)"),
        ("backwards", "note", "gave 0 for the reference in a box, 0 without one, in "),
        ("returns_timeout", "error", "timeout: the function itself returned this outcome"),
        ("slow", "warning", "more than half of reward.deadline"),
        ("missing", "error", "has no 'missing'; its functions: "),
    ],
)
def test_a_trial_finds(file, name, level, words, caplog):
    (found,) = trial(f"{file}:{name}", "42", deadline=0.5)
    assert found.level == level
    assert words.format(file=file) in " ".join((found.text, *found.examples))
    assert not caplog.text  # the finding says it
    assert bool(found.cure) == (level == "warning" or name in FAILS)


def test_math_verify_needs_no_trial():
    (found,) = trial("math_verify")
    assert found.level == "ok"


def test_without_a_reader_of_findings_an_error_is_raised_and_a_warning_logged(file, caplog):
    with pytest.raises(RewardSpecError, match="my bug"):
        try_reward(f"{file}:raises")
    with caplog.at_level(logging.WARNING):
        try_reward(f"{file}:needs_a_box")
    assert "IndexError" in caplog.text

"""A custom reward function that fails or returns something else than 0 to 1: a crash, named with its value."""

import logging

import pytest

from megatron_laser.rewards import Grade, GradingPool

CODE = """
def judge(response, answer):
    if response == "raise":
        raise RuntimeError("no such luck")
    return {"none": None, "nan": float("nan"), "two": 2, "minus": -1.0, "half": 0.5, "one": 1}[response]
"""


@pytest.fixture(scope="module")
def function(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "judging.py"
    file.write_text(CODE)
    return f"{file}:judge"


@pytest.mark.parametrize(
    ("response", "trouble"),
    [
        ("raise", "RuntimeError: no such luck"),
        ("none", "not NoneType"),
        ("nan", "from 0 (wrong) to 1 (right), not nan"),
        ("two", "from 0 (wrong) to 1 (right), not 2.0"),
        ("minus", "from 0 (wrong) to 1 (right), not -1.0"),
    ],
)
def test_what_is_no_reward_is_a_crash_that_names_the_function_and_the_value(
    function, caplog, response, trouble
):
    with caplog.at_level(logging.WARNING), GradingPool(workers=1, deadline=20.0, function=function) as pool:
        grades = pool.grade_many([(response, "7"), ("half", "7"), ("one", "7")])
    assert grades == [Grade(0.0, "crash"), Grade(0.5, "wrong"), Grade(1.0, "correct")]
    assert f"grading with {function}: crash: " in caplog.text
    assert trouble in caplog.text and "'7'" in caplog.text

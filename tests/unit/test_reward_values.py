"""A custom reward function that fails or returns something else than 0 to 1: a crash, named with its value."""

import logging

import numpy
import pytest
import torch

from megatron_laser.rewards import Grade, GradingPool
from megatron_laser.rewards.grade import as_grade

CODE = """
def judge(response, answer):
    if response == "raise":
        raise RuntimeError("no such luck")
    if response == "numpy":
        import numpy
        return {"bool": numpy.bool_(True), "float": numpy.float32(0.25), "int": numpy.int64(1)}[answer]
    if response == "array":
        import numpy
        return numpy.ones(1)
    if response == "exit":
        raise SystemExit(3)
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
        ("raise", "RuntimeError: no such luck (FILE:4 in judge)"),
        ("exit", "SystemExit: 3 (FILE:12 in judge)"),
        ("none", "not NoneType (None) (FILE:2)"),
        ("array", "not ndarray (array([1.])) (FILE:2)"),
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
    assert trouble.replace("FILE", function.rpartition(":")[0]) in caplog.text and "'7'" in caplog.text


def test_scalars_of_numpy_pass_a_worker(function):
    with GradingPool(workers=1, deadline=20.0, function=function) as pool:
        grades = pool.grade_many([("numpy", kind) for kind in ("bool", "float", "int")])
    assert grades == [Grade(1.0, "correct"), Grade(0.25, "wrong"), Grade(1.0, "correct")]


@pytest.mark.parametrize(
    "value",
    [
        numpy.bool_(True),
        numpy.float16(1),
        numpy.uint8(1),
        numpy.array(1.0),
        torch.tensor(1.0),
        torch.tensor(True),
    ],
)
def test_scalars_of_numpy_and_torch_are_grades(value):
    assert as_grade(value) == Grade(1.0, "correct")


@pytest.mark.parametrize("value", [numpy.ones(1), torch.ones(1), numpy.float32("nan"), torch.tensor(2.0)])
def test_arrays_and_scalars_out_of_range_are_no_grades(value):
    with pytest.raises((TypeError, ValueError)):
        as_grade(value)


def test_only_a_timeout_and_a_crash_are_failures_of_grading():
    outcomes = ("correct", "wrong", "no_answer", "unparsable", "timeout", "crash")
    assert [outcome for outcome in outcomes if Grade(0.0, outcome).failed] == ["timeout", "crash"]

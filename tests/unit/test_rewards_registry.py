"""Names, modules and files to reward functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_laser.rewards import (
    Grade,
    GradingPool,
    RewardSpecError,
    grade_math,
    known_rewards,
    register_reward,
    resolve_reward,
)
from megatron_laser.rewards.grade import as_grade
from megatron_laser.rewards.registry import locate_reward, reward_location


def test_math_verify_is_registered_by_its_name() -> None:
    assert resolve_reward("math_verify") is grade_math
    assert resolve_reward("megatron_laser.rewards:grade_math") is grade_math
    assert resolve_reward(grade_math) is grade_math


def test_a_file_s_function_is_found_and_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def grade(response, answer):\n    return response == answer\n")
    function = resolve_reward(f"{path}:grade")
    assert function("a", "a") == 1
    assert resolve_reward(f"{path}:grade") is function
    assert reward_location(function) == f"{path.resolve()}:grade"


def test_a_registered_function_is_found_by_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "from megatron_laser.rewards import register_reward\n"
        "@register_reward('same_text')\n"
        "def same(response, answer):\n    return response == answer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_rewards")
    assert "same_text" in known_rewards()
    with GradingPool(workers=1, deadline=10.0, function="same_text") as pool:
        grades = pool.grade_many([("a", "a"), ("a", "b")])
    assert grades == [Grade(1.0, "correct"), Grade(0.0, "wrong")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", r"no reward of this name.*math_verify"),
        ("math_verfy", "Did you mean 'math_verify'"),
        (
            "no.such.module:grade",
            r"importing .no.such.module. failed.* It is neither installed nor in PYTHONPATH\.",
        ),
        ("no/such/file.py:grade", "there is no file"),
        ("math:", "one side"),
        ("megatron_laser.rewards:nothing", "has no 'nothing'"),
        ("megatron_laser.rewards:OUTCOMES", "not a function"),
    ],
)
def test_a_bad_spec_says_what_is_wrong_and_what_is_known(spec: str, message: str) -> None:
    with pytest.raises(RewardSpecError, match=message) as error:
        resolve_reward(spec)
    assert repr(spec) in str(error.value) and "math_verify" in str(error.value)


SIGNATURES = """
def one(foo): return 1.0
def nothing(): return 1.0
def keyword(response, answer, *, extra): return 1.0
def verl(data_source, solution_str, ground_truth, tokenizer): return 1.0
def trl(prompts, completions, completion_ids, **kwargs): return [1.0]
def openrlhf(queries, prompts, labels): return [1.0]
async def coroutine(response, answer): return 1.0
def generator(response, answer): yield 1.0
class Judge:
    def __call__(self, response, answer): return float(response == answer)
class AsyncJudge:
    async def __call__(self, response, answer): return 1.0
judge, async_judge = Judge(), AsyncJudge()
exact = lambda response, answer: float(response == answer)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "one",
            r"mine\.py:2\) takes `foo`, which is none of response, answer, prompt, row, finish_reason, num_",
        ),
        ("nothing", "takes none of response, answer"),
        (
            "keyword",
            r"takes `extra`, which is none of .*defined as \(response, answer, \*, extra\).*row\['its name'\]",
        ),
        ("verl", "takes `tokenizer`, which is none of verl's data_source, solution_str"),
        ("trl", "takes `completion_ids`, which TRL's trainer has and nothing here"),
        ("openrlhf", "takes `labels`, which is none of .*OpenRLHF's signature"),
        ("coroutine", "is async and would return a coroutine"),
        ("async_judge", "is async and would return a coroutine"),
        ("generator", "is a generator"),
        ("Judge", "takes none of response"),
    ],
)
def test_a_function_of_another_shape_is_refused_with_what_is_expected(
    tmp_path: Path, name: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SIGNATURES)
    with pytest.raises(RewardSpecError, match=message):
        resolve_reward(f"{path}:{name}")


def test_callable_objects_and_named_lambdas_of_a_file_grade(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SIGNATURES)
    for name in ("judge", "exact"):
        with GradingPool(workers=1, deadline=10.0, function=f"{path}:{name}") as pool:
            assert [grade.reward for grade in pool.grade_many([("a", "a"), ("a", "b")])] == [1.0, 0.0]


def test_locating_a_function_runs_none_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "exits.py"
    path.write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate_reward(f"{path}:grade") == f"{path}:grade"
    assert locate_reward("exits:grade") == "exits:grade"
    with pytest.raises(RewardSpecError, match="there is no file"):
        locate_reward(f"{tmp_path}/none.py:grade")


def test_a_broken_file_is_named_with_its_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(RewardSpecError, match="ZeroDivisionError"):
        resolve_reward(f"{path}:grade")
    assert not any(getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values()))


def test_functions_that_workers_cannot_import_are_refused() -> None:
    def local(response: str, answer: str) -> float:
        return 1.0

    for function in (local, lambda response, answer: 1.0):
        with pytest.raises(RewardSpecError, match="top level"):
            resolve_reward(function)
        with pytest.raises(RewardSpecError, match="top level"):
            register_reward("local")(function)


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(RewardSpecError, match="already registered"):
        register_reward("math_verify")(as_grade)  # type: ignore[arg-type]
    assert register_reward("math_verify")(grade_math) is grade_math


@pytest.mark.parametrize(
    ("value", "grade"),
    [
        (1, Grade(1.0, "correct")),
        (True, Grade(1.0, "correct")),
        (0.2, Grade(0.2, "wrong")),
        (0, Grade(0.0, "wrong")),
        (Grade(0.5, "unparsable"), Grade(0.5, "unparsable")),
    ],
)
def test_numbers_and_grades_are_grades(value: object, grade: Grade) -> None:
    assert as_grade(value) == grade


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", [1], float("nan"), float("inf"), Grade(float("nan"), "wrong")),
        *(2, -1.0, 1.0001, Grade(2.0, "correct")),
    ],
)
def test_nonsense_is_no_grade(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        as_grade(value)

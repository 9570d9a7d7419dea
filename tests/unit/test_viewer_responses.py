"""The index of responses, one response with its group and votes, and growth while the viewer is open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthetic_run import metrics_line, write_dump, write_synthetic_run

from megatron_laser.viewer.api import NotThere, Viewer, ViewError, response_fields
from megatron_laser.viewer.response_index import COLUMNS
from megatron_laser.viewer.votes import AnswerForms, Votes

RESPONSES = 640


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "run"
    return write_synthetic_run(path, steps=30, responses=RESPONSES, mean_length=40)


@pytest.fixture
def viewer(folder: Path) -> Any:
    found = Viewer([folder])
    found.read_responses()
    yield found
    found.close()


def dumped(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "rollouts").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_the_index_has_what_the_dumps_have(viewer: Viewer, folder: Path) -> None:
    index = viewer.answer("responses", {"run": "0"})
    records = dumped(folder)
    assert index["count"] == len(records) == RESPONSES and index["complete"]
    assert set(index["columns"]) == set(COLUMNS)
    for column, field in (("reward", "reward"), ("length", "response_ids_length"), ("row", "row")):
        assert index["columns"][column] == [record[field] for record in records]
    for column, field in (("source", "source"), ("finish", "finish_reason"), ("outcome", "outcome")):
        table = index["tables"][column]
        assert [table[code] for code in index["columns"][column]] == [record[field] for record in records]


def test_each_response_is_read_by_its_id_with_its_tokens(viewer: Viewer, folder: Path) -> None:
    records = dumped(folder)
    for number in (0, 7, 8, 333, RESPONSES - 1):
        found = viewer.answer("response", {"run": "0", "id": str(number)})
        record = records[number]
        assert (found["id"], found["response"], found["length"]) == (
            number,
            record["response"],
            record["response_ids_length"],
        )
        assert found["tokens"]["ends"] == record["token_ends"]
        assert found["tokens"]["policy_logprob"] == record["token_policy_logprobs"]
        assert found["readouts"] == record["readouts"]


def test_a_group_has_all_responses_to_its_prompt_and_nothing_else(viewer: Viewer, folder: Path) -> None:
    records = dumped(folder)
    group = viewer.answer("response", {"run": "0", "id": "333"})["group"]
    assert len(group) == 8 and 333 in [member["id"] for member in group]
    assert {(records[m["id"]]["step"], records[m["id"]]["row"]) for m in group} == {
        (records[333]["step"], records[333]["row"])
    }
    assert [records[member["id"]]["sample"] for member in group] == list(range(8))


def test_votes_count_answers_and_weigh_them_by_clamped_scores() -> None:
    votes = Votes()
    answers = ["7", "7.0", "9", None, "9", "9"]
    found = votes.of(answers, [1, 1, 0, 0, 0, None], [1.4, 0.9, 0.2, 0.9, -3.0, None], AnswerForms({})(""))
    votes.close()
    assert found["majority"] == {"answer": "9", "right": False, "counts": [["9", 3], ["7", 2]]}
    assert found["weighted"] == {"answer": "7", "right": True, "counts": [["7", 1.9], ["9", 0.2]]}


def test_without_answers_nothing_wins_and_without_scores_nothing_is_weighed() -> None:
    found = Votes().of([None, None], [0, 0], [None, None], AnswerForms({})(""))
    assert found == {"majority": {"answer": None, "right": None, "counts": []}, "weighted": None}


def test_answers_are_read_as_the_sources_verifier_reads_them() -> None:
    forms = AnswerForms(
        {
            "reward": {"function": "math_verify"},
            "data": {"train": [{"path": "a/quiz.jsonl", "reward": "multiple_choice"}, {"path": "b.jsonl"}]},
        }
    )
    assert forms("quiz").options_key == "options" and forms("b").options_key == ""


def test_new_dumps_join_behind_the_old_ones(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path, steps=10, responses=80, mean_length=20)
    viewer = Viewer([folder])
    viewer.read_responses()
    before, version = viewer.answer("responses", {"run": "0"}), viewer.version()["version"]
    write_dump(folder, 11, 2, np.random.default_rng(1), mean_length=20)
    viewer.read_responses()
    assert viewer.answer("responses", {"run": "0"})["count"] == 80  # its step has no line of metrics yet
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(metrics_line(11, np.random.default_rng(1)))
    viewer.runs[0].files.refresh()
    viewer.read_responses()
    after = viewer.answer("responses", {"run": "0"})
    assert after["count"] == 96 and viewer.runs[0].version > version
    assert after["columns"]["length"][:80] == before["columns"]["length"]
    assert viewer.answer("response", {"run": "0", "id": "95"})["step"] == 11


def test_a_resumed_run_shows_a_step_as_it_was_done_again(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path, steps=20, responses=400, mean_length=20)
    viewer = Viewer([folder])
    viewer.read_responses()
    steps = sorted(set(viewer.answer("responses", {"run": "0"})["columns"]["step"]))
    assert steps == [10, 20]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:15]))
    viewer.runs[0].files.refresh()
    viewer.read_responses()
    assert set(viewer.answer("responses", {"run": "0"})["columns"]["step"]) == {10}
    (folder / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "again").mkdir()
    write_dump(tmp_path / "again", 20, 3, np.random.default_rng(9), mean_length=20)
    os.replace(tmp_path / "again" / "rollouts" / "step_20.jsonl", folder / "rollouts" / "step_20.jsonl")
    viewer.runs[0].files.refresh()
    viewer.read_responses()
    found = viewer.answer("responses", {"run": "0"})
    assert found["columns"]["step"].count(20) == 24
    assert viewer.answer("response", {"run": "0", "id": str(found["count"] - 1)})["sample"] == 7


def test_a_dump_that_was_deleted_is_left_out(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path, steps=20, responses=400, mean_length=10)
    viewer = Viewer([folder])
    viewer.read_responses()
    (folder / "rollouts" / "step_10.jsonl").unlink()
    viewer.read_responses()
    assert set(viewer.answer("responses", {"run": "0"})["columns"]["step"]) == {20}


def test_dumps_without_tokens_have_none(tmp_path: Path) -> None:
    viewer = Viewer([write_synthetic_run(tmp_path, steps=5, responses=16, tokens=False, old_format=True)])
    viewer.read_responses()
    found = viewer.answer("response", {"run": "0", "id": "3"})
    assert (found["tokens"], found["readouts"], found["prompt"]) == (None, {}, None)
    assert not viewer.answer("runs", {})["runs"][0]["has_tokens"]


def test_what_is_not_there_is_named(viewer: Viewer, tmp_path: Path) -> None:
    for path, query, words in (
        ("nothing", {}, "no api/nothing"),
        ("curves", {"run": "5"}, "no run '5'"),
        ("response", {"run": "0", "id": "640"}, "no response 640; it has 640"),
        ("response", {"run": "0", "id": "-1"}, "no response -1"),
        ("response", {"run": "0", "id": "x"}, "not a number"),
        ("step", {"run": "0", "step": "31"}, "no step 31"),
    ):
        with pytest.raises(NotThere, match=words):
            viewer.answer(path, query)
    for folder, words in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no run")):
        with pytest.raises(ViewError, match=words):
            Viewer([folder])


def test_runs_of_one_name_are_told_apart_and_a_folder_is_read_once(tmp_path: Path) -> None:
    folders = [write_synthetic_run(tmp_path / name, steps=3, responses=0) for name in ("a", "b")]
    viewer = Viewer([*folders, folders[0]])
    assert [run.label for run in viewer.runs] == ["synthetic (a #1)", "synthetic (b #2)"]


def test_alarms_of_the_run_are_among_its_events(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path, steps=60, responses=0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[30:]:
        row["truncated_fraction"] = 0.9
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Viewer([folder]).answer("events", {"run": "0"})
    assert any(alarm["name"].startswith("truncated") for alarm in found["alarms"]), found["alarms"]
    assert found["checkpoints"] == [30, 60]


def test_a_field_that_a_dump_lacks_is_null() -> None:
    found = response_fields(0, {"response": "x"})
    assert found["response"] == "x" and found["score"] is None and found["tokens"] is None

"""tools/prepare_data.py: what is kept, what is dropped and counted, and what is refused."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from helpers.source_tree import ROOT

from megatron_laser.data import read_rows

sys.path.insert(0, str(ROOT / "tools"))
import prepare_data as tool


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path, *records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def prepare(*values):
    return tool.main([str(value) for value in values])


def written(path):
    return [(row.problem, row.answer) for row in read_rows(path, prompt_key="problem", answer_key="answer")]


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    ("write", "name", "record", "expected"),
    [
        (parquet, "deepmath.parquet", {"question": "Q?", "final_answer": "7", "topic": "x"}, ("Q?", "7")),
        (
            jsonl,
            "math500.jsonl",
            {"problem": " P ", "solution": "so", "answer": "x^2", "unique_id": "a"},
            ("P", "x^2"),
        ),
        (jsonl, "aime.jsonl", {"id": 60, "problem": "P", "answer": 204}, ("P", "204")),
        (
            jsonl,
            "verl.jsonl",
            {
                "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "P"}],
                "reward_model": {"ground_truth": "1/2"},
            },
            ("P", "1/2"),
        ),
    ],
)
def test_known_data_sets_become_files_that_training_reads(tmp_path, output, write, name, record, expected):
    source = write(tmp_path / name, record)
    assert prepare(source, "--output", tmp_path / output) == 0
    assert written(tmp_path / output) == [expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, output])


def test_named_keys_win_over_known_ones(tmp_path):
    source = jsonl(
        tmp_path / "a.jsonl", {"problem": "no", "answer": "no", "text": "P", "meta": {"gold": 1.5}}
    )
    options = ("--prompt-key", "text", "--answer-key", "meta.gold")
    assert prepare(source, "--output", tmp_path / "out.jsonl", *options) == 0
    assert written(tmp_path / "out.jsonl") == [("P", "1.5")]


def test_unusable_rows_and_repeats_are_dropped_counted_and_named(tmp_path, capsys):
    source = jsonl(
        tmp_path / "a.jsonl",
        {"problem": "What is $1 + 1$?", "answer": "2"},
        {"problem": "a", "answer": None},
        {"problem": "b", "answer": "  "},
        {"problem": "c", "answer": [1]},
        {"problem": "d", "answer": True},
        {"problem": "", "answer": "1"},
        {"problem": "what is 1+1?", "answer": "2"},
        {"problem": r"What is $1\,+\,1$?", "answer": "3"},
        {"problem": "e", "answer": 204.0},
    )
    report = tmp_path / "report.json"
    assert prepare(source, "--output", tmp_path / "out.jsonl", "--report", report) == 0
    assert written(tmp_path / "out.jsonl") == [("What is $1 + 1$?", "2"), ("e", "204")]
    counts = json.loads(report.read_text())["counts"]
    assert counts == {
        "rows read": 9,
        "written": 2,
        "dropped: no usable answer": 4,
        "dropped: no problem": 1,
        "dropped: repeated": 1,
        "dropped: repeated, with another answer": 1,
    }
    assert f"{source}:7" in capsys.readouterr().out


def overlapping(tmp_path):
    train = jsonl(
        tmp_path / "train.jsonl",
        {"question": r"Find $\dfrac{1}{2}$ of  X", "final_answer": "1"},
        {"question": "other", "final_answer": "2"},
    )
    test = jsonl(tmp_path / "test.jsonl", {"problem": r"find \frac{1}{2} of x", "answer": "1"})
    return train, test


def test_a_problem_of_the_test_files_stops_the_tool_and_leaves_no_file(tmp_path, capsys):
    train, test = overlapping(tmp_path)
    output = tmp_path / "out.jsonl"
    assert prepare(train, "--output", output, "--test", test) == 1
    assert not output.exists() and not output.with_name("out.jsonl.partial").exists()
    captured = capsys.readouterr()
    assert f"{train}:1 = {test}:1" in captured.out
    assert "1 problems also stand in the test files" in captured.err and "--drop-overlap" in captured.err


def test_overlap_can_be_left_out(tmp_path, capsys):
    train, test = overlapping(tmp_path)
    assert prepare(train, "--output", tmp_path / "out.jsonl", "--test", test, "--drop-overlap") == 0
    assert written(tmp_path / "out.jsonl") == [("other", "2")]
    assert "1  dropped: in the test files" in capsys.readouterr().out


def test_problems_that_differ_in_a_sign_are_two(tmp_path):
    source = jsonl(
        tmp_path / "a.jsonl", {"problem": "1 + 1", "answer": "2"}, {"problem": "1 - 1", "answer": "0"}
    )
    assert prepare(source, "--output", tmp_path / "out.jsonl") == 0
    assert len(written(tmp_path / "out.jsonl")) == 2


def test_large_parquet_files_are_written_in_batches(tmp_path):
    source = parquet(
        tmp_path / "a.parquet", *({"question": f"q{i}", "final_answer": str(i)} for i in range(2345))
    )
    assert prepare(source, "--output", tmp_path / "out.parquet") == 0
    assert written(tmp_path / "out.parquet")[2344] == ("q2344", "2344")
    assert pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x", "answer": "1"}\n', "name one with --prompt-key"),
        ("a.jsonl", "{\n", ":1: not JSON"),
        ("a.jsonl", "[1]\n", "expected a JSON object"),
        ("a.csv", "x", "unknown kind of file '.csv'"),
        ("a.parquet", "x", "not readable as Parquet"),
        ("a.jsonl", '{"problem": "x", "answer": ""}\n', "no rows are left"),
        ("a.jsonl", None, "no such file"),
    ],
)
def test_what_cannot_be_used_is_named_and_an_earlier_file_stays(tmp_path, capsys, name, content, expected):
    output = jsonl(tmp_path / "out.jsonl", {"problem": "old", "answer": "1"})
    if content is not None:
        (tmp_path / name).write_text(content)
    assert prepare(tmp_path / name, "--output", output) == 2
    assert expected in capsys.readouterr().err
    assert written(output) == [("old", "1")]

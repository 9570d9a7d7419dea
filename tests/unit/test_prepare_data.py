"""tools/prepare_data.py: what is kept, what is dropped and counted, and what is refused."""

import json
import sys
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from helpers.source_tree import ROOT

from megatron_laser.data import read_rows
from megatron_laser.rewards.general.choices import multiple_choice

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
        {"problem": "c", "answer": ["1", "2"]},
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
        "dropped: no usable answer": 3,
        "dropped: several answers in a list": 1,
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
    test = jsonl(tmp_path / "test.jsonl", {"problem": r"find \left.\frac{1}{2}\right. of X", "answer": "1"})
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


def test_different_problems_are_not_called_repeated(tmp_path):
    problems = [
        r"Is A \rightarrow B the arrow meant?",
        r"Is A \leftarrow B the arrow meant?",
        "Find N if x = 2N and X = 3",
        "Find n if X = 2n and x = 3",
        "Compute 2² + 1",
        "Compute 22 + 1",
    ]
    source = jsonl(tmp_path / "a.jsonl", *({"problem": text, "answer": "1"} for text in problems))
    assert prepare(source, "--output", tmp_path / "out.jsonl") == 0
    assert [problem for problem, _ in written(tmp_path / "out.jsonl")] == problems


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([1e-7, 5e-5, 2.5], ["0.0000001", "0.00005", "2.5"]),
        ([["204"], ["3"]], ["204", "3"]),
        ([Decimal("2.50"), Decimal("1E+3")], ["2.5", "1000"]),
        (pyarrow.array([0.1, 204.0], pyarrow.float32()), ["0.1", "204"]),
        (["Eight, two and seven do.\n#### 827", r"So it is \boxed{\frac{1}{2}}."], ["827", r"\frac{1}{2}"]),
    ],
)
def test_answers_are_taken_out_of_known_forms(tmp_path, output, answers, expected):
    table = pyarrow.table({"problem": [f"p{i}" for i in range(len(answers))], "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet", "--output", tmp_path / output) == 0
    assert [answer for _, answer in written(tmp_path / output)] == expected


def test_a_first_row_without_values_decides_no_key(tmp_path):
    source = jsonl(
        tmp_path / "a.jsonl",
        {"question": None, "answer": None, "reward_model": None},
        {"question": "P", "answer": None, "reward_model": {"ground_truth": "7"}},
    )
    assert prepare(source, "--output", tmp_path / "out.jsonl") == 0
    assert written(tmp_path / "out.jsonl") == [("P", "7")]


PROSE = "The function is continuous at every point but one."


def test_answers_that_nothing_can_equal_are_counted_and_named(tmp_path, capsys):
    good = [{"problem": f"p{i}", "answer": str(i)} for i in range(2)]
    source = jsonl(tmp_path / "a.jsonl", *good, {"problem": "q", "answer": PROSE})
    assert prepare(source, "--output", tmp_path / "out.jsonl") == 0
    assert (
        f"1  WARNING, no response can equal the answer: prose\n            {source}:3"
        in capsys.readouterr().out
    )


def test_a_file_of_such_answers_is_not_written_unless_they_are_meant(tmp_path, capsys):
    source = jsonl(
        tmp_path / "a.jsonl", {"problem": "q", "answer": PROSE}, {"problem": "r", "answer": "a\nb"}
    )
    output = tmp_path / "out.jsonl"
    assert prepare(source, "--output", output) == 2
    error = capsys.readouterr().err
    assert "can equal 2 of 2 answers" in error and "--answers-as-written" in error and not output.exists()
    assert prepare(source, "--output", output, "--answers-as-written") == 0
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == [PROSE, "a\nb"]


def test_half_of_an_emoji_costs_its_row_alone(tmp_path, capsys):
    source = jsonl(
        tmp_path / "a.jsonl",
        {"problem": "half \ud83d", "answer": "1"},
        {"problem": "p", "answer": "\ude00"},
        {"problem": "p", "answer": "1"},
    )
    test = jsonl(tmp_path / "t.jsonl", {"problem": "half \ud83d", "answer": "1"})
    assert prepare(source, "--output", tmp_path / "out.jsonl", "--test", test) == 0
    assert written(tmp_path / "out.jsonl") == [("p", "1")]
    assert (
        f"2  dropped: half of a surrogate pair, which is not text\n            {source}:1"
        in capsys.readouterr().out
    )


def test_status_1_says_overlap_and_nothing_else(tmp_path, capsys, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", {"problem": "p", "answer": "1"})
    assert prepare(source, "--output", tmp_path / "o.jsonl", "--report", tmp_path / "no" / "r.json") == 2
    monkeypatch.setattr(tool, "unique_rows", lambda options, report: 1 / 0)
    assert prepare(source, "--output", tmp_path / "out.jsonl") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


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


def choice(path):
    return [(row.problem, json.loads(row.answer)) for row in read_rows(path, **GENERAL)]


GENERAL = {"prompt_key": "problem", "answer_key": "answer", "mathematics": False}


@pytest.mark.parametrize("answer", ["B", 1, "two of  them"])
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_column_of_options_becomes_a_problem_with_letters_and_a_reference_with_texts(
    tmp_path, write, answer
):
    row = {"question": "Which?", "options": ["one", "two of them", "three"], "answer": answer}
    source = write(tmp_path / ("mmlu.jsonl" if write is jsonl else "mmlu.parquet"), row)
    assert prepare(source, "--choices", "options", "--output", tmp_path / "out.jsonl") == 0
    ((problem, reference),) = choice(tmp_path / "out.jsonl")
    assert problem == "Which?\n\nA. one\nB. two of them\nC. three"
    assert reference == {"answer": "B", "options": ["one", "two of them", "three"]}
    answer = read_rows(tmp_path / "out.jsonl", **GENERAL)[0].answer
    assert [
        multiple_choice(text, answer).reward for text in (r"\boxed{B}", r"\boxed{Two of them}", r"\boxed{C}")
    ] == [
        1.0,
        1.0,
        0.0,
    ]


def test_columns_of_wrong_options_are_put_into_an_order_that_is_always_the_same_and_hides_the_right_one(
    tmp_path,
):
    records = [
        {"Question": f"Q{n}?", "Right": f"right {n}", "W1": "a", "W2": "b", "W3": "c"} for n in range(40)
    ]
    source = jsonl(tmp_path / "gpqa.jsonl", *records)
    options = ("--choices", "W1", "W2", "W3", "--answer-key", "Right")
    for name in ("one.jsonl", "two.jsonl"):
        assert prepare(source, *options, "--output", tmp_path / name) == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    letters = []
    for number, (problem, reference) in enumerate(choice(tmp_path / "one.jsonl")):
        assert sorted(reference["options"]) == ["a", "b", "c", f"right {number}"]
        assert reference["options"]["ABCD".index(reference["answer"])] == f"right {number}"
        assert f"\n{reference['answer']}. right {number}" in problem
        letters.append(reference["answer"])
    assert all(
        4 <= letters.count(letter) <= 18 for letter in "ABCD"
    )  # 10 each, within three standard deviations


def test_rows_whose_options_do_not_fit_are_dropped_and_counted(tmp_path, capsys):
    source = jsonl(
        tmp_path / "a.jsonl",
        {"question": "1?", "options": ["x", "y"], "answer": "A"},
        {"question": "2?", "options": ["x", "y"], "answer": "C"},
        {"question": "3?", "options": None, "answer": "A"},
        {"question": "4?", "options": ["x", ""], "answer": "A"},
    )
    assert prepare(source, "--choices", "options", "--output", tmp_path / "out.jsonl") == 0
    assert [problem[:2] for problem, _ in choice(tmp_path / "out.jsonl")] == ["1?"]
    assert "3  dropped: no options, or an answer that is none of them" in capsys.readouterr().out

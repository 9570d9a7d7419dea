"""Data files to rows: what is read, and errors that name the place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_laser.data import DataError, Row, fingerprint, read_ids, read_rows


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read(*paths: Path) -> list[Row]:
    return read_rows(paths, prompt_key="problem", answer_key="answer")


def test_rows_are_numbered_over_all_files_in_order(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", {"problem": "1+1?", "answer": "2", "level": 1})
    second = write_parquet(
        tmp_path / "b.parquet", {"answer": [3, 4], "x": [0, 0], "problem": ["1+2?", "2+2?"]}
    )
    assert read(second, first) == [
        Row(0, "1+2?", "3", f"{second} row 0"),
        Row(1, "2+2?", "4", f"{second} row 1"),
        Row(2, "1+1?", "2", f"{first}:1"),
    ]
    assert read_rows(str(first), prompt_key="problem", answer_key="answer")[0].problem == "1+1?"


def test_ids_are_read_in_the_order_of_the_rows_where_there_are_any(tmp_path: Path) -> None:
    mixed = write_jsonl(tmp_path / "a.jsonl", {"problem": "1?", "id": 7}, {"problem": "2?"}, {"id": "x"})
    assert read_ids(mixed, "id") == ["7", None, "x"]
    assert read_ids(mixed, "name") == [None, None, None]
    columns = write_parquet(tmp_path / "b.parquet", {"id": [5, None], "problem": ["1?", "2?"]})
    assert read_ids(columns, "id") == ["5", None]
    assert read_ids(columns, "name") == [None, None]


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "a\u2028b\x85c"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps({"problem": text, "answer": "é"}, ensure_ascii=False).encode()
        + b"\r\n\n \n"
    )
    assert read(path) == [Row(0, text, "é", f"{path}:1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"problem": "x", "answer": }', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["x", "y"]', "expected a JSON object on each line, found a list"),
        (b'{"problem": "\xff", "answer": "1"}', "not UTF-8"),
        (b'{"problm": "x", "answer": "1"}', "no key 'problem' .data.prompt_key.. Did you mean 'problm'"),
        (
            b'{"problem": "x", "solution": "1"}',
            "no key 'answer' .data.answer_key.. Found: 'problem', 'solution'",
        ),
        (b'{"problem": " ", "answer": "1"}', "'problem' .data.prompt_key. is empty"),
        (b'{"problem": "x", "answer": ""}', "'answer' .data.answer_key. is empty"),
        (
            b'{"problem": ["x"], "answer": "1"}',
            "expected a string, or a list of turns with role and content, found",
        ),
        (
            b'{"problem": 5, "answer": "1"}',
            "expected a string, or a list of turns with role and content, found 5",
        ),
        (
            b'{"problem": [], "answer": "1"}',
            "expected a string, or a list of turns with role and content, found",
        ),
        (b'{"problem": [{"role": "user"}], "answer": "1"}', "turn 1 has role 'user' and content None"),
        (b'{"problem": [{"role": "tool", "content": "x"}], "answer": "1"}', "turn 1 has role 'tool'"),
        (b'{"problem": [{"role": "user", "content": " "}], "answer": "1"}', "is empty"),
        (
            b'{"problem": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "1"}',
            "the last turn is the assistant's; expected the user's",
        ),
        (
            b'{"problem": "x", "answer": true}',
            "expected a text, a number or a list of one of them, found True",
        ),
        (
            b'{"problem": "x", "answer": null}',
            "expected a text, a number or a list of one of them, found None",
        ),
        (b'{"problem": "x", "answer": ["1", "2"]}', r"expected a text, .* found \['1', '2'\]"),
        (b'{"problem": "x", "answer": NaN}', "expected a text, .* found nan"),
        (b'{"problem": "x", "answer": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (
            b'{"problem": "half \\ud83d", "answer": "1"}',
            r"'problem' .* half of a surrogate pair \(.ud83d, character 6\)",
        ),
        (
            b'{"problem": "x", "answer": "\\ude00"}',
            r"'answer' .data.answer_key. holds half of a surrogate pair",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"problem": "x", "answer": "1"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_pyarrow_that_refuses_this_numpy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p"], "answer": ["1"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # an import of it raises ImportError
    for attempt in (lambda: read(path), lambda: read_ids(path, "id")):
        with pytest.raises(DataError, match=r"a\.parquet: Parquet needs pyarrow.* has NumPy \d.*pyarrow<26"):
            attempt()


def test_a_bad_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"problems": ["x"], "answer": ["1"]})
    with pytest.raises(
        DataError, match=r"no column 'problem'.*Did you mean 'problems'.*Found: 'problems', 'answer'"
    ):
        read(path)
    path = write_parquet(tmp_path / "b.parquet", {"problem": ["x", "y"], "answer": ["1", None]})
    with pytest.raises(DataError, match=r"b\.parquet row 1: 'answer'.*found None"):
        read(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read(path)


def test_bytes_in_a_parquet_file_that_are_no_text_are_named(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"half \xed\xa0\xbd"]).view(pyarrow.string())
    pyarrow.parquet.write_table(
        pyarrow.table({"problem": texts, "answer": ["1", "2"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"a\.parquet row 1: not UTF-8"):
        read(tmp_path / "a.parquet")


def test_files_that_give_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no such file"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not a file"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("problem,answer\n")
    with pytest.raises(DataError, match=r"'\.csv'; expected \.jsonl, \.ndjson, \.parquet"):
        read(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no rows"):
        read(write_jsonl(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no rows"):
        read(write_parquet(tmp_path / "empty.parquet", {"problem": [], "answer": []}))
    with pytest.raises(DataError, match="at least one path"):
        read()


def test_the_fingerprint_follows_content_order_and_keys_but_not_names(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", {"problem": "x", "answer": "1"})
    second = write_jsonl(tmp_path / "b.jsonl", {"problem": "y", "answer": "2"})
    copy = write_jsonl(tmp_path / "c.jsonl", {"problem": "x", "answer": "1"})
    keys = ("problem", "answer")
    base = fingerprint([first, second], keys)
    assert base.startswith("sha256:") and len(base) == 7 + 64
    assert fingerprint([copy, second], keys) == base
    others = [
        fingerprint([second, first], keys),
        fingerprint([first], keys),
        fingerprint(first, ("problem", "solution")),
        fingerprint([first, second, second], keys),
    ]
    assert len({base, *others}) == 5
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        fingerprint(tmp_path / "none.jsonl", keys)


def test_a_problem_may_be_a_conversation_in_either_kind_of_file(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 3?"},
    ]
    lines = write_jsonl(tmp_path / "a.jsonl", {"problem": chat, "answer": "5"})
    for file in (lines, write_parquet(tmp_path / "a.parquet", {"problem": [chat], "answer": ["5"]})):
        (row,) = read(file)
        assert (row.problem, row.answer) == ("2 + 3?", "5")
        assert row.turns == (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))

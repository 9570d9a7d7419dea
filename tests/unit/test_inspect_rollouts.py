"""tools/inspect_rollouts.py: the right responses, in the right order, readable in a pipe."""

import io
import json
import subprocess
import sys

import pytest
from helpers.source_tree import ROOT
from rich.console import Console

sys.path.insert(0, str(ROOT / "tools"))
import inspect_rollouts as tool


def response(
    row, *, right, score, outcome=None, finish="stop", length=10, advantage=0.0, text="so \\boxed{4}"
):
    return {
        "row": row,
        "sample": 0,
        "problem": "What is [2+2]?",
        "answer": "4",
        "response": text,
        "reward": float(right),
        "outcome": outcome or ("correct" if right else "wrong"),
        "scored": score is not None,
        "score": score,
        "advantage": advantage,
        "finish_reason": finish,
        "response_ids_length": length,
    }


RESPONSES = [
    response(0, right=True, score=0.9, length=30, advantage=0.5),
    response(1, right=False, score=0.8, length=20, advantage=-0.5),
    response(2, right=False, score=0.1, length=40, advantage=1.5, outcome="no_answer"),
    response(3, right=False, score=None, length=50, finish="length", text="never [bold]done"),
    response(4, right=True, score=0.5, length=10),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "step_1.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in RESPONSES))
    return path


def lines_of(file, *options):
    return [
        r["line"] for r in tool.selected(tool.read_responses(file), tool.arguments([str(file), *options]))
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [1, 2, 3, 4, 5]),
        (("--right",), [1, 5]),
        (("--wrong",), [2, 3, 4]),
        (("--wrong", "--min-score", "0.5"), [2]),
        (("--max-score", "0.5"), [3, 5]),
        (("--finish", "length"), [4]),
        (("--outcome", "no_answer", "--outcome", "wrong"), [2, 3, 4]),
        (("--row", "4"), [5]),
        (("--sort", "score"), [1, 2, 5, 3, 4]),
        (("--sort", "score", "--ascending"), [3, 5, 2, 1, 4]),
        (("--sort", "length"), [4, 3, 1, 2, 5]),
        (("--sort", "advantage", "--right"), [1, 5]),
    ],
)
def test_filters_and_orders_pick_these_lines(file, options, expected):
    assert lines_of(file, *options) == expected


def shown(file, *options, **console):
    out = io.StringIO()
    settings = {"width": 140} | console
    status = tool.main([str(file), *options], Console(file=out, highlight=False, **settings))
    return status, out.getvalue()


def test_the_confusion_counts_every_match_and_not_only_those_listed(file):
    _, text = shown(file, "--limit", "1")
    assert "5 of 5 responses match, the first 1 are shown" in text
    rows = {
        line.split()[0]: line.split()[1:]
        for line in text.splitlines()
        if line.split()[:1] in (["right"], ["wrong"])
    }
    assert rows["right"] == ["1", "1", "0", "50.0%"]  # 0.5 is not above 0.5
    assert rows["wrong"] == ["1", "1", "1", "50.0%"]


def test_one_response_is_shown_in_full_and_its_brackets_are_not_markup(file):
    status, text = shown(file, "--show", "4")
    assert status == 0
    assert "never [bold]done" in text and "What is [2+2]?" in text
    assert "length" in text and "score                -" in text


def test_a_long_list_is_paged_on_a_terminal_and_not_in_a_pipe(file, monkeypatch):
    paged = []
    monkeypatch.setattr("rich.pager.SystemPager.show", lambda self, content: paged.append(content))
    shown(file)
    assert not paged
    shown(file, force_terminal=True, height=4)
    assert len(paged) == 1 and "responses match" in paged[0]
    shown(file, "--no-pager", force_terminal=True, height=4)
    assert len(paged) == 1


def test_evaluation_files_without_advantages_are_read_too(tmp_path):
    record = {key: value for key, value in RESPONSES[0].items() if key != "advantage"} | {"extracted": "4"}
    path = tmp_path / "test_step_3.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert shown(path)[0] == 0
    assert "extracted" in shown(path, "--show", "1")[1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "line 1: not JSON"), ('{"step": 1}', "expected a response"), (None, "no such file")],
)
def test_what_cannot_be_shown_is_named(tmp_path, capsys, content, expected):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    assert shown(path)[0] == 2
    assert expected in capsys.readouterr().err


def test_a_run_folder_lists_its_files(file, tmp_path, capsys):
    (tmp_path / "rollouts").mkdir()
    file.rename(tmp_path / "rollouts" / "step_1.jsonl")
    assert shown(tmp_path)[0] == 2
    assert "rollouts/step_1.jsonl" in capsys.readouterr().err
    assert shown(tmp_path / "rollouts" / "step_1.jsonl", "--show", "9")[0] == 2
    assert "has lines 1 to 5" in capsys.readouterr().err


def test_it_works_in_a_pipe_that_closes_early(tmp_path):
    path = tmp_path / "step_1.jsonl"
    path.write_text("".join(json.dumps(RESPONSES[0]) + "\n" for _ in range(3000)))
    command = f"{sys.executable} {ROOT}/tools/inspect_rollouts.py {path} --limit 0 | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert "verdict" in done.stdout and "\x1b" not in done.stdout

"""Grading workers: what ends with them, what their user code may see and leave behind, and which code they run."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.custom_reward import CUSTOM, alive, wait_until

from megatron_laser.rewards import Grade, GradingPool, RewardSpecError


@pytest.fixture(scope="module")
def custom_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "custom_reward.py"
    path.write_text(CUSTOM)
    return path


@pytest.fixture(scope="module")
def custom_pool(custom_file: Path) -> Iterator[GradingPool]:
    with GradingPool(workers=1, deadline=1.0, function=f"{custom_file}:act") as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "trouble"),
    [
        ("hang", r"no answer within 1 s \(.*custom_reward\.py:\d+ in act\)"),
        ("segfault", r"killed by SIGSEGV \(.*custom_reward\.py:\d+ in act\)"),
        ("exit", r"exit status 3"),
        ("files", r"OSError: .*Too many open files.*custom_reward\.py:\d+ in act\)"),
    ],
)
def test_what_ends_a_worker_is_named_with_the_user_s_line(
    custom_pool: GradingPool, response: str, trouble: str
) -> None:
    custom_pool.grade_many([(response, "")])
    assert re.search(trouble, custom_pool.last_trouble), custom_pool.last_trouble


def test_a_forked_child_that_comes_back_does_not_answer_the_next_request(custom_pool: GradingPool) -> None:
    items = [("fork", ""), ("wrong", ""), ("fork", ""), ("right", "")]
    assert [grade.reward for grade in custom_pool.grade_many(items)] == [1.0, 0.0, 1.0, 1.0]


def test_output_is_passed_on_up_to_a_limit(custom_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with GradingPool(workers=1, deadline=5.0, function=f"{custom_file}:act") as pool:
        assert pool.grade_many([("flood", "")] * 2) == [Grade(1.0, "correct")] * 2
    out, err = capfd.readouterr()
    assert not out
    assert 10_000 < len(err) < 20_000 and "the rest is dropped" in err


def left_behind(file: Path) -> list[int]:
    pids = [int(pid) for pid in file.read_text().split()] if file.exists() else []
    return [pid for pid in pids if alive(pid)]


@pytest.mark.parametrize("end", ["close", "timeout", "killed grader", "killed guard"])
def test_children_of_a_grader_end_with_it(custom_file: Path, tmp_path: Path, end: str) -> None:
    children = tmp_path / "children"
    with GradingPool(workers=1, deadline=1.0, function=f"{custom_file}:act") as pool:
        pool.grade_many([("leave and hang" if end == "timeout" else "leave", str(children))])
        if end == "timeout":
            assert "timeout" in pool.last_trouble
        else:
            assert len(left_behind(children)) == 2
        if end.startswith("killed"):
            (pid,) = pool.worker_pids()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(parent if end == "killed guard" else pid, signal.SIGKILL)
            if end == "killed guard":  # nobody is left who knows the child that has left the group
                assert wait_until(lambda: not alive(pid))
                pool.grade_many([("right", "")])
                in_group, other = (int(child) for child in children.read_text().split())
                assert wait_until(lambda: not alive(in_group))
                os.kill(other, signal.SIGKILL)
    assert wait_until(lambda: not left_behind(children))


def test_children_of_a_grader_end_when_the_pool_s_process_is_killed(
    tmp_path: Path, custom_file: Path
) -> None:
    children = tmp_path / "children"
    script = textwrap.dedent(f"""
        import time
        from megatron_laser.rewards import GradingPool
        pool = GradingPool(2, 600.0, function={str(custom_file) + ":act"!r})
        pool.submit("leave and hang", {str(children)!r})
        print(*pool.worker_pids(), flush=True)
        time.sleep(600)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert wait_until(lambda: len(left_behind(children)) == 2)
        parent.kill()
    assert wait_until(lambda: not any(alive(pid) for pid in pids) and not left_behind(children))


def test_restarted_workers_grade_with_the_code_of_the_start_and_the_edit_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    helper, late, mine = (tmp_path / f"{name}.py" for name in ("snapshot_helper", "snapshot_late", "mine"))
    helper.write_text("VALUE = 0.25\n")
    late.write_text("VALUE = 0.125\n")
    mine.write_text(
        "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\nimport snapshot_helper\n"
        "def grade(response, answer):\n"
        "    if response == 'exit':\n        os._exit(1)\n"
        "    if response == 'late':\n        import snapshot_late\n        return snapshot_late.VALUE\n"
        "    return snapshot_helper.VALUE\n"
    )
    with GradingPool(workers=1, deadline=10.0, function=f"{mine}:grade") as pool:
        start = pool.source_fingerprints()
        assert set(start) == {str(mine), str(helper)}
        first = [grade.reward for grade in pool.grade_many([("", ""), ("late", "")])]
        for file in (helper, late):
            file.write_text("VALUE = 1.0\n")
        mine.unlink()  # as when another branch is checked out
        pool._next_look = 0.0
        after = [grade.reward for grade in pool.grade_many([("exit", ""), ("", ""), ("late", "")])]
        pool._next_look = 0.0
        pool.grade_many([("", "")])
        assert first == [0.25, 0.125] and after == [0.0, 0.25, 0.125]
        for file in (helper, late, mine):
            assert caplog.text.count(f"{file} was edited: this run goes on") == 1
    mine.write_text("def grade(response, answer):\n    return 1.0\n")
    with GradingPool(workers=1, deadline=10.0, function=f"{mine}:grade") as resumed:
        resumed.say_if_edited_since(start)
        assert f"{mine} was edited since the checkpoint" in caplog.text
        caplog.clear()
        resumed.say_if_edited_since(resumed.source_fingerprints())
        assert not caplog.text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(4)", r"running .*module\.py failed: SystemExit: 4 \(.*module\.py:1\)"),
        ("import os; os._exit(4)", r"importing it ended the process of a grading worker \(exit status 4\)"),
        ("import no_such_package", r"ModuleNotFoundError: .*no_such_package.*module\.py:1\)"),
        ("def grade(r, a) return 1", r"SyntaxError.*module\.py:1\)"),
    ],
)
def test_a_module_that_ends_at_import_ends_a_worker_and_not_the_trainer(
    tmp_path: Path, code: str, message: str
) -> None:
    (tmp_path / "module.py").write_text(code + "\n")
    with pytest.raises(RewardSpecError, match=message):
        GradingPool(workers=2, function=f"{tmp_path}/module.py:grade")


def test_files_of_the_working_directory_do_not_hide_modules_from_workers(
    tmp_path: Path, custom_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit('not the library')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with GradingPool(workers=1, deadline=5.0, function=f"{custom_file}:act") as pool:
        assert pool.grade_many([("right", "")]) == [Grade(1.0, "correct")]


def test_a_pool_works_in_a_process_with_many_open_files() -> None:
    """A run with servers has more connections than select() knows numbers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with GradingPool(workers=1) as pool:
            assert pool.grade_many([("\\boxed{1/2}", "0.5")])[0].outcome == "correct"
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

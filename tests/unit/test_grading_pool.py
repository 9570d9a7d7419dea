"""The grading pool: order, deadlines, hostile answers, dying workers, and nothing left behind."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_laser.rewards import Grade, GradingPool, GradingPoolError, RewardSpecError, grade_math

CUSTOM = '''
import os, sys, time

def act(response, answer):
    """Does what the response says."""
    if response == "hang":
        time.sleep(600)
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise RuntimeError("no such luck")
    if response == "segfault":
        import ctypes
        ctypes.string_at(0)
    if response == "recursion":
        return act(response, answer)
    if response == "leave":  # one child in the group, one in a session of its own
        import subprocess
        for new_session in (False, True):
            child = subprocess.Popen(["sleep", "600"], start_new_session=new_session)
            with open(answer, "a") as file:
                file.write(f"{child.pid} ")
        return 1
    if response == "leave and hang":
        act("leave", answer)
        time.sleep(600)
    if response == "fork":  # both sides return
        return 1 if os.fork() else 0.25
    if response == "close":
        os.closerange(3, 64)
        return 1
    if response == "kill parent":
        import signal
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    if response == "flood":
        for _ in range(40):
            print("x" * 100_000)
        return 1
    if response == "files":
        act.files = getattr(act, "files", [])
        while True:
            act.files.append(open("/dev/null"))
    if response == "torch":
        return float("torch" in sys.modules)
    if response == "memory":
        bytearray(64 << 30)
    if response == "count":
        act.calls = getattr(act, "calls", 0) + 1
        return act.calls / 100
    return {"text": "five", "nan": float("nan"), "none": None, "right": 1, "wrong": 0.0}[response]
'''


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: object, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=2, deadline=3.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def custom_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "custom_reward.py"
    path.write_text(CUSTOM)
    return path


@pytest.fixture(scope="module")
def custom_pool(custom_file: Path) -> Iterator[GradingPool]:
    with GradingPool(workers=1, deadline=1.0, function=f"{custom_file}:act") as pool:
        yield pool


def test_grades_come_in_order_and_equal_those_of_grade_math(pool: GradingPool) -> None:
    answers = ["5", r"\frac{1}{2}", "0.5", "x+1", "1+x", r"\sqrt{8}", r"2\sqrt{2}", "?"]
    items = [(f"so \\boxed{{{left}}}", right) for left in answers for right in answers]
    items.insert(7, ("no box", "5"))
    assert pool.grade_many(items) == [grade_math(*item) for item in items]
    assert pool.grade_many([]) == []


HOSTILE = [
    (r"\boxed{9^{9^{9^9}}}", {"timeout", "crash"}),
    (r"\boxed{" + "{" * 10**6 + "5" + "}" * 10**6 + "}", {"unparsable"}),
    (r"\boxed{" + "{" * 900 + "5" + "}" * 900 + "}", {"timeout", "unparsable", "correct"}),
    (r"\boxed{\frac{1}{\sqrt{", {"unparsable"}),
    (r"\boxed{\left(\frac{1}{2}\right]]}", {"wrong", "unparsable"}),
    (r"\boxed{" + "x+" * 50_000 + "1}", {"unparsable"}),
    ("word " * 20_000, {"no_answer"}),
    ("\\boxed{\x00\x1b[31m\x7f\ud800}", {"unparsable"}),
    (r"\boxed{" + "$" * 1900 + "}", {"unparsable", "timeout"}),
]


def test_hostile_answers_end_with_their_outcome_and_the_pool_lives(pool: GradingPool) -> None:
    start = time.monotonic()
    grades = pool.grade_many([(response, "5") for response, _ in HOSTILE])
    for (response, outcomes), grade in zip(HOSTILE, grades, strict=True):
        assert grade.outcome in outcomes, response[:40]
    assert time.monotonic() - start < 3 * (3.0 + 5.0)
    assert pool.grade_many([(r"\boxed{\frac{3}{6}}", "0.5")]) == [Grade(1.0, "correct")]


def test_quick_decisions_and_repeated_pairs_do_not_reach_a_worker(pool: GradingPool) -> None:
    items = [(r"\boxed{5}", "5"), (r"\boxed{5}", "6"), (r"\boxed{x}", "x"), ("5", "5"), (r"\boxed{", "5")]
    assert all(pool.submit(*item).done() for item in items)
    hard = (r"\boxed{\frac{7}{14}}", "0.5")
    assert pool.submit(*hard).result(timeout=30) == Grade(1.0, "correct")
    assert pool.submit(*hard).done()


def test_equal_items_in_flight_are_graded_once_and_cancelling_one_spares_the_others(
    pool: GradingPool,
) -> None:
    futures: list[Future[Grade]] = [pool.submit(r"\boxed{\frac{9}{18}}", "0.5") for _ in range(8)]
    futures[3].cancel()
    grades = [future.result(timeout=30) for future in futures if not future.cancelled()]
    assert set(grades) == {Grade(1.0, "correct")}


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("right", "correct"),
        ("wrong", "wrong"),
        ("hang", "timeout"),
        ("exit", "crash"),
        ("raise", "crash"),
        ("memory", "crash"),
        ("text", "crash"),
        ("nan", "crash"),
        ("none", "crash"),
        ("unknown", "crash"),
        ("segfault", "crash"),
        ("recursion", "crash"),
        ("fork", "correct"),
        ("close", "correct"),
        ("kill parent", "crash"),
        ("flood", "correct"),
        ("files", "crash"),
    ],
)
def test_a_custom_function_may_do_anything(custom_pool: GradingPool, response: str, outcome: str) -> None:
    assert custom_pool.grade_many([(response, ""), ("right", "")]) == [
        Grade(1.0 if outcome == "correct" else 0.0, outcome),  # type: ignore[arg-type]
        Grade(1.0, "correct"),
    ]


def test_a_custom_function_is_called_every_time(custom_pool: GradingPool) -> None:
    rewards = [grade.reward for grade in custom_pool.grade_many([("count", "")] * 3)]
    assert [round(reward - rewards[0], 2) for reward in rewards] == [0.0, 0.01, 0.02]


def test_workers_do_not_import_torch_nor_the_main_module(tmp_path: Path, custom_file: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, types
        sys.modules["torch"] = types.ModuleType("torch")  # as a trainer's main module has
        from megatron_laser.rewards import GradingPool
        pool = GradingPool(1, 10.0, function={str(custom_file) + ":act"!r})  # no __main__ guard either
        print(pool.grade_many([("torch", "")])[0].reward)
        pool.close()
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.stdout.strip() == "0.0", result.stderr


def test_trouble_is_logged_a_few_times_only(custom_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with GradingPool(workers=1, deadline=5.0, function=f"{custom_file}:act") as pool:
        assert {grade.outcome for grade in pool.grade_many([("raise", "41")] * 10)} == {"crash"}
    lines = [record.getMessage() for record in caplog.records if "crash" in record.getMessage()]
    assert len(lines) == 3
    assert "RuntimeError: no such luck" in lines[0] and "'41'" in lines[0]


def test_a_worker_killed_in_the_middle_of_an_item_costs_that_item_only(custom_file: Path) -> None:
    with GradingPool(workers=1, deadline=60.0, function=f"{custom_file}:act") as pool:
        hanging = pool.submit("hang", "")
        after = pool.submit("right", "")
        (pid,) = pool.worker_pids()
        time.sleep(0.2)
        assert not hanging.done()
        os.kill(pid, signal.SIGKILL)
        assert hanging.result(timeout=30) == Grade(0.0, "crash")
        assert after.result(timeout=30) == Grade(1.0, "correct")


def test_a_process_with_more_open_files_than_select_takes_can_grade() -> None:
    """A rollout has a connection for each open request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with GradingPool(workers=1) as pool:
            assert pool.grade_many([("\\boxed{x+y}", "y+x")])[0].reward == 1.0
            assert len(pool.worker_pids()) == 1
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_killed_while_idle_costs_nothing(custom_file: Path) -> None:
    with GradingPool(workers=1, deadline=30.0, function=f"{custom_file}:act") as pool:
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid) or not pool.worker_pids())
        assert pool.grade_many([("right", "")]) == [Grade(1.0, "correct")]


def test_a_stopped_worker_cannot_block_the_pool(custom_file: Path) -> None:
    with GradingPool(workers=1, deadline=1.0, function=f"{custom_file}:act") as pool:
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        # more than a socket's buffer: already sending would block
        assert pool.grade_many([("right" * 10**6, "")]) == [Grade(0.0, "timeout")]
        assert pool.grade_many([("right", "")]) == [Grade(1.0, "correct")]


def test_grade_many_returns_at_its_own_deadline(custom_file: Path) -> None:
    with GradingPool(workers=1, deadline=60.0, function=f"{custom_file}:act") as pool:
        start = time.monotonic()
        grades = pool.grade_many([("right", ""), ("hang", ""), ("right", "")], deadline=2.0)
        assert time.monotonic() - start < 10.0
        assert [grade.outcome for grade in grades] == ["correct", "timeout", "timeout"]


def test_closing_ends_the_workers_and_fails_what_waits(custom_file: Path) -> None:
    pool = GradingPool(workers=2, deadline=60.0, function=f"{custom_file}:act")
    pids = pool.worker_pids()
    futures = [pool.submit("hang", "") for _ in range(4)]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    pool.close()
    pool.close()
    assert not any(alive(pid) for pid in pids)
    for future in futures:
        with pytest.raises(GradingPoolError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(GradingPoolError, match="closed"):
        pool.submit("right", "")


def test_workers_die_with_their_parent_even_in_the_middle_of_an_item(
    tmp_path: Path, custom_file: Path
) -> None:
    script = textwrap.dedent(f"""
        import time
        from megatron_laser.rewards import GradingPool
        pool = GradingPool(2, 600.0, function={str(custom_file) + ":act"!r})
        pool.submit("hang", "")
        print(*pool.worker_pids(), flush=True)
        time.sleep(600)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_pool_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    guarded = tmp_path / "only_in_parent.py"
    guarded.write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    raise ImportError('not in a worker')\n"
        "def grade(response, answer):\n    return 1.0\n"
    )
    with pytest.raises(RewardSpecError, match=rf"not in a worker \({guarded}:3\)"):
        GradingPool(workers=2, function=f"{guarded}:grade")
    slow = tmp_path / "slow_import.py"
    slow.write_text(
        f"import os, time\nif os.getpid() != {os.getpid()}:\n    time.sleep(60)\n"
        "def grade(response, answer):\n    return 1.0\n"
    )
    with pytest.raises(GradingPoolError, match="not ready after 1 s"):
        GradingPool(workers=1, function=f"{slow}:grade", start_deadline=1.0)


@pytest.mark.parametrize(
    "settings", [{"workers": 0}, {"workers": 1, "deadline": 0.0}, {"workers": 1, "deadline": float("nan")}]
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        GradingPool(**settings)  # type: ignore[arg-type]


def test_an_unknown_function_is_refused_before_any_process_starts() -> None:
    with pytest.raises(RewardSpecError, match="Did you mean 'math_verify'"):
        GradingPool(workers=1, function="math_verfiy")


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

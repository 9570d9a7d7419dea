"""The grading pool: order, deadlines, hostile answers, dying workers, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers.custom_reward import CUSTOM, alive, wait_until

from megatron_laser.rewards import Grade, GradingPool, GradingPoolError, RewardSpecError, grade_math


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
    (r"\boxed{9^{9^{9^9}}}", {"unparsable"}),
    (r"\boxed{\int_0^\infty e^{-x^2}\sin(x^3) dx}", {"timeout"}),
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

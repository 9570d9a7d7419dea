"""reward.memory_limit_gib and reward.max_processes hold what a worker's functions, and their children, may use."""

import time

import pytest

from megatron_laser.rewards import Grade, GradingPool

CODE = """
import subprocess, sys, time

def act(response, answer):
    if response == "memory":
        bytearray(int(float(answer) * 2**30))
    if response == "child's memory":
        done = subprocess.run([sys.executable, "-S", "-c", f"bytearray(int({answer} * 2**30))"], capture_output=True)
        return float(done.returncode == 0)
    if response == "processes":
        children = [subprocess.Popen(["sleep", "600"]) for _ in range(int(answer))]
        time.sleep(1.0)
        for child in children:
            child.kill()
    return 1.0
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "limits.py"
    path.write_text(CODE)
    with GradingPool(1, 20.0, f"{path}:act", memory_limit_gib=1.0, max_processes=2) as pool:
        yield pool


def test_memory_is_limited_in_a_worker_and_in_what_it_starts(limited):
    items = [("memory", "0.2"), ("memory", "1"), ("child's memory", "0.2"), ("child's memory", "1")]
    grades = limited.grade_many(items)
    assert grades == [Grade(1.0, "correct"), Grade(0.0, "crash"), Grade(1.0, "correct"), Grade(0.0, "wrong")]


def test_more_processes_than_allowed_end_the_worker_at_once_and_the_next_response_is_graded(limited):
    assert limited.grade_many([("processes", "2")]) == [Grade(1.0, "correct")]
    started = time.monotonic()
    assert limited.grade_many([("processes", "3")]) == [Grade(0.0, "crash")]
    assert time.monotonic() - started < 10
    assert "more than 2 processes (reward.max_processes)" in limited.last_trouble
    assert limited.grade_many([("", "")]) == [Grade(1.0, "correct")]

"""tools/gpu_day_one.sh: which stages run, what one that fails or hangs costs, and a whole rehearsal without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.source_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from gpu_day_one import __main__ as runner_module
from gpu_day_one.plan import BACKGROUND, ROUNDS, chosen, parts
from gpu_day_one.records import Records
from gpu_day_one.table import render

SCRIPT = ROOT / "tools" / "gpu_day_one.sh"


def runner(out: Path, work: Path, only: str | None = None, budget: float = 100.0) -> runner_module.Runner:
    work.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    return runner_module.Runner(out, work, rehearse=True, budget=budget, names=chosen(only))


@pytest.fixture
def statuses(monkeypatch):
    """Parts end as this dict says, at once; gives (statuses, names in the order of their starts)."""
    told: dict[str, str] = {}
    started: list[str] = []

    def process(self, part, limit):
        started.append(part.full_name)
        return told.get(part.full_name, "finished"), "its last words"

    monkeypatch.setattr(runner_module.Runner, "_process", process)
    return told, started


def test_a_name_is_a_stage_or_a_part_and_the_small_example_brings_its_base_model():
    assert chosen("kernels.score,env") == {"kernels.score", "env"}
    assert {"kernels.exact", "kernels.cuda", "kernels.linear"} <= chosen("kernels")
    assert chosen("small") == {"small", "small.base"}
    with pytest.raises(ValueError, match="no such stage; there are small, env, kernels"):
        chosen("kernel")


def test_all_stages_fit_into_nine_minutes():
    rounds = [max(sum(part.limit for part in lane) for lane in lanes) for lanes in ROUNDS]
    # Limits are several times what is expected; the budget cuts what is left over, and the decisive stages come first.
    assert sum(rounds[:5]) < 530 and max(part.limit for part in BACKGROUND) < 530
    assert len({part.full_name for part in parts()}) == len(parts())


def test_a_part_that_fails_stops_no_other_and_a_second_call_skips_what_is_finished(tmp_path, statuses):
    told, started = statuses
    told |= {"kernels.cuda": "timed out", "train": "failed with exit status 1"}
    assert not runner(tmp_path / "out", tmp_path / "work").run()
    assert set(started) == chosen(None)
    table = (Records(tmp_path / "out")).rows()
    assert "kernels.cuda did not finish" in render(table) and "its last words" in render(table)
    started.clear()
    told.clear()
    assert runner(tmp_path / "out", tmp_path / "work").run()
    assert started == ["kernels.cuda", "train"]


def test_a_rehearsal_is_no_run(tmp_path):
    records = Records(tmp_path)
    records.note("env", status="finished", rehearse=True)
    assert records.finished(rehearse=True) == {"env"} and records.finished(rehearse=False) == set()


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    Records(tmp_path).note("env", "ceilings", tflops=1.5)
    with (tmp_path / "day_one.jsonl").open("a") as file:
        file.write('{"part": "env", "wh')
    assert [row["tflops"] for row in Records(tmp_path).rows()] == [1.5]
    Records(tmp_path).note("env", status="finished")
    assert Records(tmp_path).finished(rehearse=False) == {"env"}  # and takes no other line with it


def test_nothing_is_started_when_the_budget_is_spent(tmp_path, statuses):
    assert not runner(tmp_path / "out", tmp_path / "work", "env", budget=5.0).run()
    assert statuses[1] == [] and Records(tmp_path / "out").rows()[0]["status"] == "no time left"


def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tools'}")
    status, _ = runner(tmp_path / "out", tmp_path / "work")._process(parts()[1], 0.2)
    assert status == "timed out"


@pytest.mark.parametrize(
    ("limit", "does", "expected"),
    [
        (0.3, "signal.signal(15, signal.SIG_IGN); time.sleep(100)", "timed out"),
        (50.0, "os.kill(os.getppid(), 9); os._exit(0)", "failed with exit status -9"),
    ],
)
def test_what_only_sigkill_ends_has_timed_out_and_what_was_killed_before_has_not(
    tmp_path, monkeypatch, limit, does, expected
):
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, signal, sys, time\nif 'gpu_day_one.stage' in sys.orig_argv: {does}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}:{ROOT / 'tools'}")
    monkeypatch.setattr(runner_module, "_KILL_AFTER", 1)
    status, _ = runner(tmp_path / "out", tmp_path / "work")._process(parts()[1], limit)
    assert status == expected


def test_a_signal_ends_the_parts_and_a_killed_calls_parts_are_waited_for(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nif 'gpu_day_one.stage' in sys.orig_argv: time.sleep(100)  # no part ends by itself\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}:{ROOT / 'tools'}")
    command = [
        sys.executable,
        "-m",
        "gpu_day_one",
        tmp_path / "out",
        "--work",
        tmp_path,
        "--rehearse",
        "--only",
        "env",
    ]
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as call:
            assert call.stdout.readline().startswith("env: at most")
            while not psutil.Process(call.pid).children():
                time.sleep(0.01)
            (part,) = psutil.Process(call.pid).children()
            call.send_signal(number)
            call.wait()
        if number == signal.SIGKILL:
            assert not runner(tmp_path / "out", tmp_path).wait_until_alone(0.0)
            part.terminate()
        psutil.wait_procs([part], timeout=20)
        assert not part.is_running()
        assert runner(tmp_path / "out", tmp_path).wait_until_alone(20.0)
    assert Records(tmp_path / "out").finished(rehearse=True) == set()


def test_a_signal_that_does_not_wake_the_main_thread_is_handled_while_parts_run(tmp_path):
    script = f"""
import signal, sys, threading, time
from pathlib import Path
from gpu_day_one.__main__ import Runner

def process(self, part, limit):
    time.sleep(0.5)  # the main thread waits by now
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    time.sleep(5)
    return "finished", ""

Runner._process = process
folder = Path({str(tmp_path)!r})
runner = Runner(folder, folder, rehearse=True, budget=60.0, names={{"env"}})
runner.end_with_signals()
runner.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert Records(tmp_path).finished(rehearse=True) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onyl", "env"], "unknown argument '--onyl'"),
        (["--only"], "--only needs a value"),
        (["--wheels", "/nonexistent"], "no wheels there"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments, message, tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_stage_runs_to_its_end_without_a_gpu(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out", "--rehearse"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "day_one.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows if row.get("status") == "finished"} == chosen(None)
    of = lambda part, what: [row for row in rows if (row["part"], row["what"]) == (part, what)]  # noqa: E731
    assert all(row["right"] for row in of("kernels.exact", "exact"))
    assert {row["arm"] for row in of("train", "summary")} == {"GRPO", "LaSeR"}
    assert of("train", "summary")[0]["predicted_gib"] == of("train", "dry_run")[0]["update_gib"] > 0
    assert all(row["bitwise"] for row in of("offload", "round_trip"))
    assert of("small", "progress")[0]["step"] == 2
    assert of("server", "server")[0]["needs"]

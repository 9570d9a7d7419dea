"""`megatron-laser status`: what a folder says of its run, read from the ends of its files by another process."""

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from helpers.source_tree import ROOT
from helpers.synthetic_run import write_synthetic_run
from typer.testing import CliRunner

from megatron_laser import files
from megatron_laser.cli import app
from megatron_laser.cli import status as command
from megatron_laser.files import LOCK, is_locked, last_lines, lock_folder
from megatron_laser.run.observed import SILENT, NoRun, observe
from megatron_laser.run.observed_view import COLUMNS, one_run, table
from megatron_laser.run.status import Status, StatusFile, read_status

GONE = 2**22 + 1  # no process has this id


@pytest.fixture
def run(tmp_path):
    return write_synthetic_run(tmp_path / "run", steps=60, responses=0, total_steps=100, finished=False)


def say(folder, state="running", *, ago=0.0, **more):
    at = (datetime.now(UTC) - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
    first = {"host": socket.gethostname(), "pid": os.getpid(), "steps": 100, "time": at, "phase_since": at}
    (folder / "status.json").write_text(json.dumps({"state": state, **first, **more}))


def held(folder):
    """The lock of a live run: another open file, as another process has."""
    lock = (folder / LOCK).open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def ask(*arguments):
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def test_a_live_run_says_what_it_does_for_how_long_and_what_is_left(run):
    say(run, phase="train step 61", step=60, command="megatron-laser train run.yaml", ago=7)
    with held(run):
        seen = observe(run)
    assert (seen.state, seen.step, seen.steps, seen.exit_status) == ("running", 60, 100, 4)
    assert seen.phase == "train step 61" and 6 <= seen.phase_seconds < 60
    assert seen.step_seconds == pytest.approx(58, abs=2)  # generate 30, logprob 6, train 20, sync 2
    assert seen.seconds_left == pytest.approx(40 * seen.step_seconds)
    assert seen.metrics["lr"] == 1e-6 and 0 < seen.metrics["AUROC"] < 1 and seen.metrics["entropy"] > 0
    assert seen.checkpoint == 60 and seen.evaluation.startswith("validation after step 50: accuracy")
    text = "\n".join(one_run(seen))
    assert "train step 61, for " in text and "60 of 100" in text and f"megatron-laser stacks {run}" in text
    assert "continue" not in text


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(run):
    say(run, pid=GONE, phase="train step 61", ago=600)
    (run / LOCK).touch()
    seen = observe(run)
    assert (seen.state, seen.exit_status, seen.seconds_left) == (SILENT, 5, None)
    assert re.search(r"last heard of 10m\d\ds ago, in: train step 61", "\n".join(one_run(seen)))
    # The process of another run has its number by now: the lock knows better.
    say(run, pid=os.getpid())
    assert observe(run).state == SILENT
    # On another machine whose locks do not reach this one, a fresh sign of life counts.
    say(run, host="elsewhere", ago=20)
    assert observe(run).state == "running"
    say(run, host="elsewhere", ago=600)
    assert observe(run).state == SILENT


def test_without_file_locks_the_process_says_whether_it_lives(run, monkeypatch):
    monkeypatch.setattr("megatron_laser.run.observed.is_locked", lambda folder: None)
    say(run, ago=600)
    assert observe(run).state == "running"
    say(run, pid=GONE)
    assert observe(run).state == SILENT


@pytest.mark.parametrize(
    ("state", "said", "exit_status"),
    [
        *(("finished", 0, 0), ("stopped", 3, 3), ("stopped", 0, 3)),
        *(("failed", 2, 2), ("failed", None, 1), ("failed", 137, 137)),
    ],
)  # fmt: skip
def test_the_exit_status_is_the_runs(run, state, said, exit_status):
    say(run, state, reason="because", exit_status=said, command="megatron-laser train run.yaml")
    done = ask(run, "--exit-status")
    assert done.exit_code == exit_status and f"{state}: because" in done.output
    assert ("continue    megatron-laser train run.yaml" in done.output) == (state != "finished")
    assert ask(run).exit_code == 0
    well = write_synthetic_run(run.parent / "well", steps=10, responses=0)
    assert ask(well, run, "--exit-status").exit_code == exit_status


def test_a_run_that_begins_again_is_not_told_by_its_last_word(run):
    say(run, "stopped", pid=GONE, exit_status=3)
    with held(run):
        assert observe(run).state == "starting"
    assert observe(run).state == "stopped"
    say(run, "stopped", exit_status=3)  # its own process has not let go yet
    with held(run):
        assert observe(run).state == "stopped"


def test_a_run_of_an_earlier_version_is_told_by_its_other_files(run):
    assert observe(run).state == SILENT
    (run / "STOPPED").write_text('{"step": 60, "reason": "SIGTERM"}')
    assert (observe(run).state, observe(run).reason, observe(run).exit_status) == ("stopped", "SIGTERM", 3)
    with held(run):
        assert observe(run).state == "running"
    (run / "FINISHED").write_text('{"step": 60}')
    assert observe(run).exit_status == 0


def test_alarms_and_servers_that_are_over_are_not_shown(run):
    def add(kind, text, **more):
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": "T", "step": 60, "kind": kind, "text": text, **more}) + "\n")

    add("start", "starts", facts={"steps": 100, "ranks": 8, "run": "named"})
    add("alarm", "alarm at step 9: slow: 3. It means", alarm="straggler", on=True)
    add("alarm", "alarm at step 12: cut: 0.9, since step 3. It means", alarm="truncated", on=True)
    add("alarm", "alarm over: slow", alarm="straggler", on=False)
    add("server", "http://a:1 is lost: no answer")
    add("server", "http://b:1 is lost: no answer")
    add("server", "http://a:1 is back")
    seen = observe(run)
    assert seen.alarms == ["truncated: alarm at step 12: cut: 0.9, since step 3"]
    assert seen.lost_servers == ["http://b:1"] and (seen.name, seen.world_size) == ("named", 8)
    assert not any("facts" in event for event in seen.events) and len(seen.events) == 5
    add("start", "starts again")
    assert observe(run).lost_servers == []


def test_the_newest_checkpoint_is_a_published_one_wherever_they_lie(run, tmp_path):
    for name in ("step_00000080", "step_00000090.partial"):  # incomplete; being written
        (run / "checkpoints" / name).mkdir()
    assert observe(run).checkpoint == 60
    elsewhere = tmp_path / "elsewhere" / "step_00000070"
    elsewhere.mkdir(parents=True)
    (elsewhere / "state.json").write_text("{}")
    with (run / "events.jsonl").open("a") as file:
        facts = {"checkpoints": str(elsewhere.parent)}
        file.write(json.dumps({"step": 60, "kind": "start", "text": "s", "facts": facts}) + "\n")
    (run / "best.json").write_text('{"step": 50, "metric": "eval/accuracy", "value": 0.5}')
    seen = observe(run)
    assert seen.checkpoint == 70
    assert any("best of step 50 (eval/accuracy 0.5)" in line for line in one_run(seen))


def test_several_runs_are_a_table_and_json_has_the_same(run):
    other = write_synthetic_run(run.parent / "other", steps=10, responses=0)
    header, first, second = ask(run, other).output.splitlines()
    assert header.split() == list(COLUMNS)
    assert SILENT in first and " 60/100 " in first and "finished" in second
    assert table([observe(run), observe(other)]) == [header, first, second]
    values = json.loads(ask(run, other, "--json").output)
    assert [value["state"] for value in values] == [SILENT, "finished"]
    assert json.loads(ask(run, "--json").output)["step"] == 60


def test_a_folder_without_a_run_is_an_error_that_says_what_was_expected(tmp_path):
    for folder, says in ((tmp_path / "none", "is no folder"), (tmp_path, "holds no run")):
        with pytest.raises(NoRun, match=says):
            observe(folder)
        done = ask(folder)
        assert done.exit_code == 2 and "run.output_dir" in " ".join(done.output.split())


def test_a_run_that_has_written_nothing_yet_is_shown(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "new"}')
    seen = observe(tmp_path)
    assert (seen.name, seen.step, seen.steps, seen.checkpoint, seen.metrics) == ("new", 0, 0, None, {})
    assert "none yet" in "\n".join(one_run(seen))


def test_watching_ends_with_the_run_and_its_exit_status(run, monkeypatch):
    lock = held(run)
    say(run)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            lock.close()
            say(run, "stopped", exit_status=3)

    monkeypatch.setattr(command.time, "sleep", sleep)
    done = ask(run, "--watch", "0.5", "--exit-status")
    assert looks == [0.5, 0.5] and done.exit_code == 3
    assert done.output.count("\nstate ") == 3


def test_the_phase_is_timed_from_its_beginning_and_not_from_the_last_sign_of_life(tmp_path, monkeypatch):
    times = iter(f"2026-01-01T00:00:{second:02d}Z" for second in range(60))
    monkeypatch.setattr("megatron_laser.run.status.utc_now", lambda: next(times))
    monkeypatch.setattr("megatron_laser.run.status._SIGN_OF_LIFE", 0.0)
    file = StatusFile(tmp_path, every=1000.0, phase="one")
    first = read_status(tmp_path)
    file.flush()
    again = read_status(tmp_path)
    assert again.phase_since == first.phase_since and again.time > first.time
    file.update(phase="two")
    file.flush()
    assert read_status(tmp_path).phase_since > again.phase_since
    file._closing.set()
    assert Status().phase_since == ""


def test_looking_takes_no_longer_for_a_long_run_and_needs_no_torch(run):
    line = (run / "metrics.jsonl").read_text().splitlines()[-1]
    with (run / "metrics.jsonl").open("a") as file:
        for _ in range(40):
            file.write((line + "\n") * 2000)
    assert (run / "metrics.jsonl").stat().st_size > 60e6
    started = time.process_time()
    observe(run)
    assert time.process_time() - started < 0.1
    code = f"import sys; from megatron_laser.cli import app; app(['status', {str(run)!r}], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_last_lines_of_a_file_are_whole_ones_however_long_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_TAIL", 64)
    path = tmp_path / "lines"
    assert last_lines(path, most=3) == []
    rows = [{"n": n, "text": "x" * (n * 10)} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"n": ')
    assert last_lines(path, most=3) == rows[-3:]
    assert last_lines(path, most=100) == rows
    assert last_lines(path, most=0, at_least=1 << 20) == rows


def test_looking_at_a_lock_does_not_keep_a_run_from_starting(tmp_path):
    assert is_locked(tmp_path) is False
    lock = lock_folder(tmp_path, "run.output_dir")
    assert is_locked(tmp_path) is True
    lock.close()
    look = (tmp_path / LOCK).open("rb")
    fcntl.flock(look, fcntl.LOCK_SH)  # somebody looks at this moment

    def sleep(seconds):
        look.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.time, "sleep", sleep)
        lock_folder(tmp_path, "run.output_dir").close()

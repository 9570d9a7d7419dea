"""Every signal in every phase: said at once, and over within the seconds that docs/stopping.md gives for the phase."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.ranks import start_ranks
from helpers.source_tree import ROOT
from helpers.tiny_run import end_session, write_tiny_run
from helpers.torchrun import worker_environment

from megatron_laser.run.status import read_status
from megatron_laser.trainer.checkpoint import folder as folders

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("heard_signals")]

SCRIPT = Path(__file__).with_name("phases_run.py")
PAGE = (ROOT / "docs" / "stopping.md").read_text(encoding="utf-8")
SAID_WITHIN = 3.0  # seconds; another rank hears of it with the next heartbeat
STEPS = 3

# phase -> (state, its last step, published checkpoints)
OUTCOMES = {
    "start": ("stopped", 0, []),
    "first evaluation": ("stopped", 0, []),
    "rollout": ("stopped", 1, [1]),
    "train": ("stopped", 2, [2]),
    "sync": ("stopped", 2, [2]),
    "evaluate": ("stopped", 2, [2]),
    "save": ("stopped", 2, [2]),
    "asynchronous save": ("stopped", None, None),  # it may have begun step 3 by then
    "export": ("stopped", 3, [2, 3]),
    "final evaluation": ("stopped", 3, [2, 3]),
    "final report": ("finished", 3, [2, 3]),
}
SETTINGS = {
    "first evaluation": ["evaluation.baseline=true"],
    "evaluate": ["evaluation.every=2"],
    "asynchronous save": ["checkpoint.asynchronous=true"],
    "export": ["checkpoint.export_hf=true"],
}


def table(heading):
    """The cells of the table below a heading of the page, without its head."""
    part = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


BOUNDS = {cells[0]: float(cells[2]) for cells in table("Phases")}
ASKING = " ".join(cells[0] for cells in table("Signals") if "Asks to stop" in cells[1])
# Each phase once, each signal, both numbers of processes: the rest of the product is marked `long`.
CORE = {
    ("start", "SIGINT", 2),
    ("first evaluation", "SIGHUP", 1),
    ("rollout", "SIGTERM", 2),
    ("train", "SIGINT", 1),
    ("sync", "SIGUSR1", 2),
    ("evaluate", "SIGTERM", 1),
    ("save", "SIGHUP", 1),
    ("asynchronous save", "SIGINT", 1),
    ("export", "SIGINT", 2),
    ("final evaluation", "SIGUSR1", 1),
    ("final report", "SIGTERM", 1),
}
# "agent": torchrun, which passes on what it handles: SIGUSR1 would end it.
TARGETS = (1, 2, "agent")


def product():
    for phase in OUTCOMES:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            for target in TARGETS:
                if (target, name) != ("agent", "SIGUSR1"):
                    marks = () if (phase, name, target) in CORE else (pytest.mark.long,)
                    yield pytest.param(phase, name, target, marks=marks)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    file = write_tiny_run(
        folder, run={"steps": STEPS}, evaluation={"every": 0, "final_samples_per_prompt": 2}
    )
    rows = "".join(json.dumps({"problem": f"{i} + 7 ?", "answer": str(i + 7)}) + "\n" for i in range(4))
    for name in ("validation", "test"):
        (folder / f"{name}.jsonl").write_text(rows)
    return file


def test_the_page_has_every_phase_and_signal_of_the_tests():
    assert set(BOUNDS) == set(OUTCOMES)
    assert sorted(re.findall(r"`(SIG\w+)`", ASKING)) == ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1"]


def arguments(file, phase, folder):
    data = [f"data.test={file.parent / 'test.jsonl'}", f"data.validation={file.parent / 'validation.jsonl'}"]
    settings = [*data, *SETTINGS.get(phase, ()), f"run.output_dir={folder / 'out'}"]
    return [phase, str(folder), str(file), *settings]


def wait_for(condition, seconds, output):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, output()[-5000:]
        time.sleep(0.02)


class Forked:
    """One process or two ranks; with two the signal goes to rank 1, which rank 0 has to hear of."""

    def __init__(self, arguments, processes, folder):
        self.ranks = start_ranks(SCRIPT, processes, *arguments)
        self.pid = None

    def send(self, number):
        os.kill(self.ranks[-1].pid, number)

    def output(self):
        return "".join(rank.output for rank in self.ranks)

    def ended(self):
        return all(rank.poll() is not None for rank in self.ranks)

    def statuses(self):
        return [rank.poll() for rank in self.ranks]

    def end(self):
        for rank in self.ranks:
            rank.end()


class Torchrun:
    """Two ranks of torchrun, to which the signal goes."""

    def __init__(self, arguments, folder):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(SCRIPT), *arguments],
                env=worker_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send(self, number):
        os.kill(self.process.pid, number)

    def output(self):
        return self.log.read_text()

    def ended(self):
        return self.process.poll() is not None

    def end(self):
        end_session(self.process)


@pytest.mark.parametrize("phase, name, target", list(product()))
def test_a_signal_is_answered_within_the_phases_bound(file, tmp_path, phase, name, target):
    state, step, checkpoints = OUTCOMES[phase]
    given = arguments(file, phase, tmp_path)
    run = Torchrun(given, tmp_path) if target == "agent" else Forked(given, target, tmp_path)
    try:
        wait_for((tmp_path / "reached").exists, 60, run.output)
        sent = time.monotonic()
        run.send(getattr(signal, name))
        wait_for(lambda: f"{name}: " in run.output(), SAID_WITHIN, run.output)
        wait_for(run.ended, BOUNDS[phase] - (time.monotonic() - sent), run.output)
        output = run.output()
    finally:
        run.end()
    status = read_status(tmp_path / "out")
    assert status.state == state, output
    assert status.exit_status == (3 if state == "stopped" else 0)
    published = [number for number, _ in folders.published(tmp_path / "out" / "checkpoints")]
    if step is None:
        step = status.step
        checkpoints = sorted({2, step})
    assert (status.step, published) == (step, checkpoints), output
    assert status.checkpoint == (published[-1] if published else None)
    stopped = tmp_path / "out" / "STOPPED"
    if state == "stopped":
        assert json.loads(stopped.read_text()) == {"step": step, "reason": name}
        assert status.reason == name and re.search(rf"stopped.* \({name}\)", output)
    assert ("done: " in output, stopped.exists()) == (state == "finished", state == "stopped"), output
    assert (tmp_path / "out" / "FINISHED").exists() == (state == "finished")
    if target == "agent":
        assert "SignalException" in output  # of torchrun's own, which ends with 1 after every signal
    else:
        assert "Traceback" not in output, output
        assert run.statuses() == ([status.exit_status] if target == 1 else [0, 0]), output


def children_of(pid):
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def test_a_second_signal_ends_at_once_says_what_is_lost_and_leaves_nobody(file, tmp_path):
    """In a call that Python cannot leave: the request waits for it, the second signal does not."""
    run = Forked([*arguments(file, "hang", tmp_path), "checkpoint.every=1"], 1, tmp_path)
    try:
        wait_for((tmp_path / "reached").exists, 60, run.output)
        children = children_of(run.ranks[0].pid)
        run.send(signal.SIGINT)
        wait_for(lambda: "SIGINT: " in run.output(), SAID_WITHIN, run.output)
        run.send(signal.SIGTERM)  # as one Ctrl-C that a launcher passes on
        time.sleep(2.2)
        assert not run.ended()
        run.send(signal.SIGTERM)
        wait_for(run.ended, 3.0, run.output)
        output = run.output()
        wait_for(lambda: not any(map(running, children)), 10, lambda: f"{children} are left")
    finally:
        run.end()
    assert children and run.statuses() == [128 + signal.SIGTERM]
    lost = "step 2 lost: the checkpoint of step 1 is the last one"
    assert f"SIGTERM again: ended at once by a second signal; {lost}" in output
    assert "Traceback" not in output and not (tmp_path / "out" / "STOPPED").exists()
    status = read_status(tmp_path / "out")
    assert (status.state, status.exit_status, status.checkpoint) == ("failed", 143, 1)
    assert lost in status.reason


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

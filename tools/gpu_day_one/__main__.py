"""Runs the parts of `plan`, each in a process of its own under `timeout -k`; their lines are in OUT/day_one.jsonl."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from gpu_day_one.plan import BACKGROUND, BASE, REHEARSAL_LIMIT, ROUNDS, TRAIN, Part, chosen
from gpu_day_one.records import Records
from gpu_day_one.table import render

_KILL_AFTER = 5  # seconds between SIGTERM and SIGKILL
_FEWEST = 10.0  # seconds that are worth starting a part for
_ALONE_WITHIN = 60.0  # seconds that parts of a killed call get to end


class Runner:
    """One call of the script."""

    def __init__(self, out: Path, work: Path, *, rehearse: bool, budget: float, names: set[str]) -> None:
        self._records = Records(out)
        self._out, self._work, self._rehearse, self._names = out, work, rehearse, names
        self._until = time.monotonic() + budget
        self._done = self._records.finished(rehearse=rehearse) & names
        self._base_ready = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._starting = (
            threading.Lock()
        )  # held while a part starts, and for good once a signal ends the call
        self._lock = (work / "lock").open("a")

    def end_with_signals(self) -> None:
        """A signal that ends this process ends its parts, too: left behind, they would disturb the next call."""

        ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

        def end(number: int, _: FrameType | None) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # a second one would wait for the lock for good
            self._starting.acquire()  # the main thread, in which handlers run, never holds it
            for process in list(self._running):
                process.terminate()  # `timeout`, which passes it on to all of the part
            print(f"ended by {signal.Signals(number).name}; the same command goes on", flush=True)
            os._exit(128 + number)

        for number in ending:
            signal.signal(number, end)

    def wait_until_alone(self, seconds: float = _ALONE_WITHIN) -> bool:
        """Until no part of an earlier call, which SIGKILL may have ended, runs; False, with a note, if one goes on.

        Parts hold the lock of the work folder with the runner.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    break
            time.sleep(0.2)
        self._records.note(
            "env",
            "not_alone",
            message=f"another call, or a part of one, holds {self._work}/lock: timings are disturbed",
        )
        return False

    def run(self) -> bool:
        """All chosen parts; True if each is finished now or was before."""
        background = [threading.Thread(target=self._lane, args=((part,),)) for part in BACKGROUND]
        for thread in background:
            thread.start()
        for lanes in ROUNDS:
            threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
            for thread in threads:
                thread.start()
            _join(threads)
        _join(background)
        return self._names <= self._records.finished(rehearse=self._rehearse)

    def _lane(self, lane: tuple[Part, ...]) -> None:
        for part in lane:
            try:
                if part.full_name in self._names:
                    if part is TRAIN:
                        self._base_ready.wait(max(0.0, self._until - time.monotonic()))
                    self._part(part)
            finally:
                if part is BASE:
                    self._base_ready.set()

    def _part(self, part: Part) -> None:
        name = part.full_name
        if name in self._done:
            print(f"{name}: finished before", flush=True)
            return
        left = self._until - time.monotonic()
        if left < _FEWEST:
            self._records.note(name, status="no time left", rehearse=self._rehearse)
            return
        limit = min(REHEARSAL_LIMIT if self._rehearse else part.limit, left - _KILL_AFTER)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        status, log = self._process(part, limit)
        self._records.note(
            name,
            status=status,
            seconds=round(time.monotonic() - started, 1),
            rehearse=self._rehearse,
            **({} if status == "finished" else {"log": log}),
        )

    def _process(self, part: Part, limit: float) -> tuple[str, str]:
        command = [
            "timeout",
            "-k",
            str(_KILL_AFTER),
            f"{limit:.1f}",
            sys.executable,
            "-m",
            "gpu_day_one.stage",
        ]
        command += [part.full_name, str(self._out), str(self._work)] + ["--rehearse"] * self._rehearse
        log = self._work / f"{part.full_name}.log"
        with log.open("w") as output, self._starting:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=_environment(self._rehearse, part),
                pass_fds=(self._lock.fileno(),),
            )
            self._running.add(process)
        started = time.monotonic()
        try:
            code: int | None = process.wait(limit + 2 * _KILL_AFTER)
        except subprocess.TimeoutExpired:
            code = None  # blocked in the driver, where no signal reaches it: go on without it
        self._running.discard(process)
        text = log.read_text(errors="replace")
        with (self._out / "day_one.log").open("a") as whole:
            whole.write(f"\n== {part.full_name}\n{text}")
        # `timeout` kills its whole group, and so itself; before the limit somebody else has killed the part.
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL) and time.monotonic() - started >= limit
        statuses = {0: "finished", 124: "timed out", None: "hangs beyond SIGKILL"}
        status = "timed out" if killed else statuses.get(code, f"failed with exit status {code}")
        return status, "\n".join(text.splitlines()[-12:])[-1500:]


def _join(threads: list[threading.Thread]) -> None:
    """Wait for them, in short turns.

    A signal that arrives just before the main thread blocks does not wake it: its handler would run when the wait ends.
    """
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)


def _environment(rehearse: bool, part: Part) -> dict[str, str]:
    environment = dict(os.environ)
    if rehearse:
        # Triton's own interpreter stands in for the compiler; a GPU that is there is not looked at.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if part is BASE:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def main() -> int:
    """The command line behind tools/gpu_day_one.sh."""
    parser = argparse.ArgumentParser(
        prog="gpu_day_one", description="Called by tools/gpu_day_one.sh, whose --help says more."
    )
    parser.add_argument("out", type=Path, help="folder for day_one.jsonl, .txt and .log")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and other large files")
    parser.add_argument("--only", help="stages or parts of them, with commas between")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, on a CPU")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds in all")
    arguments = parser.parse_args()
    try:
        names = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(
        arguments.out,
        arguments.work,
        rehearse=arguments.rehearse,
        budget=arguments.budget,
        names=names,
    )
    runner.end_with_signals()
    runner.wait_until_alone()
    complete = runner.run()
    table = render(Records(arguments.out).rows())
    (arguments.out / "day_one.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

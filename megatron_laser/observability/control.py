"""What may be asked of a live run through its output folder: the stacks of all its ranks, a window of the profiler.

    control/rank_3.json               who the ranks are: host and process id
    control/requests/stacks-ID.json   each rank writes stacks/ID/rank_N.txt
    control/requests/profile-ID.json  rank 0 has all ranks begin a window with the next step, and deletes the file

Each rank looks there with a thread of its own, every two seconds: a folder that hangs must not silence the heartbeat,
and a main thread that hangs does not keep it from answering. No torch, no process group.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_laser.files import write_atomically
from megatron_laser.observability.quantities import utc_now

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
_REQUEST = re.compile(r"(stacks|profile)-([\w.-]+)\.json")


@dataclass(frozen=True)
class RankProcess:
    """One rank of a run, as it said when it started."""

    rank: int
    world_size: int
    host: str
    pid: int


class Watcher:
    """A rank's thread that answers requests. Best effort: what cannot be read or written is one warning."""

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        world_size: int,
        *,
        phase: Callable[[], str],
        on_profile: Callable[[int], None] | None = None,
    ) -> None:
        """Say who this rank is, and start looking.

        Args:
            phase: what it does, in words; called from the thread.
            on_profile: begin a window of so many steps; None: not this rank's business.
        """
        self._output_dir = output_dir
        self._me = RankProcess(rank, world_size, socket.gethostname(), os.getpid())
        self._phase, self._on_profile = phase, on_profile
        self._warned = False
        self._stop = threading.Event()
        self._seen = set(_requests(output_dir))  # of earlier attempts of the run
        self._best_effort(lambda: write_atomically(self._file, json.dumps(asdict(self._me)) + "\n"))
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more answers; a thread that hangs in a file system is left alone."""
        self._stop.set()
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():
            self._best_effort(lambda: self._file.unlink(missing_ok=True))
            _remove_empty(self._output_dir)

    @property
    def _file(self) -> Path:
        return _folder(self._output_dir) / f"rank_{self._me.rank}.json"

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._best_effort(self._look)

    def _look(self) -> None:
        for name in _requests(self._output_dir):
            match = _REQUEST.fullmatch(name)
            if name in self._seen or match is None:
                continue
            self._seen.add(name)
            kind, request = match.groups()
            if kind == "stacks":
                target = stacks_folder(self._output_dir, request) / f"rank_{self._me.rank}.txt"
                write_atomically(target, self._answer())
            elif self._on_profile is not None:
                file = _folder(self._output_dir) / "requests" / name
                self._on_profile(int(json.loads(file.read_text(encoding="utf-8"))["steps"]))
                file.unlink()

    def _answer(self) -> str:
        me = self._me
        who = f"rank {me.rank} of {me.world_size}, process {me.pid} on {me.host}"
        head = f"{who}, {utc_now()}\nphase: {self._phase()}\n"
        return head + "".join(all_stacks())

    def _best_effort(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # a file system, a request that somebody wrote by hand
            if not self._warned:
                self._warned = True
                logger.warning(
                    "requests in %s: %s: %s; the run goes on",
                    _folder(self._output_dir),
                    type(error).__name__,
                    error,
                )


def all_stacks() -> Iterator[str]:
    """The Python stack of each thread of this process, the main one first, the innermost line last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    for ident in sorted(frames, key=lambda ident: (ident != main, ident)):
        yield f"\nthread {names.get(ident, 'of a library')} ({ident})\n"
        yield from traceback.format_stack(frames[ident])


@dataclass(frozen=True)
class Stacks:
    """folder: where they are. phases: of each rank that answered. silent: the ranks that did not."""

    folder: Path
    phases: dict[int, str]
    silent: list[RankProcess]


def ask_for_stacks(output_dir: Path, *, deadline: float) -> Stacks:
    """Have all ranks of a live run write their stacks, and wait for them for `deadline` seconds at most.

    Raises LookupError where no live run has said who its ranks are; OSError where nothing can be written.
    """
    ranks = known_ranks(output_dir)
    request = _new_request()
    folder = stacks_folder(output_dir, request)
    file = _ask(output_dir, f"stacks-{request}.json", {})
    ends = time.monotonic() + deadline
    try:
        while not all(_stack_file(folder, one.rank).exists() for one in ranks) and time.monotonic() < ends:
            time.sleep(0.1)
    finally:
        file.unlink(missing_ok=True)
        _remove_empty(output_dir)
    there = [one for one in ranks if _stack_file(folder, one.rank).exists()]
    phases = {
        one.rank: _stack_file(folder, one.rank)
        .read_text(encoding="utf-8")
        .splitlines()[1]
        .removeprefix("phase: ")
        for one in there
    }
    return Stacks(folder, phases, [one for one in ranks if one not in there])


def ask_for_window(output_dir: Path, steps: int, *, deadline: float) -> bool:
    """Have a live run profile its next `steps` steps; whether rank 0 has heard of it within `deadline` seconds.

    Raises as `ask_for_stacks`.
    """
    known_ranks(output_dir)
    file = _ask(output_dir, f"profile-{_new_request()}.json", {"steps": steps})
    ends = time.monotonic() + deadline
    while file.exists() and time.monotonic() < ends:
        time.sleep(0.1)
    heard = not file.exists()
    file.unlink(missing_ok=True)
    _remove_empty(output_dir)
    return heard


def known_ranks(output_dir: Path) -> list[RankProcess]:
    """The ranks of the run that writes into `output_dir`; those of an attempt with more ranks are left out.

    Raises LookupError where there is none.
    """
    found = []
    for path in _folder(output_dir).glob("rank_*.json"):
        try:
            found.append(RankProcess(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # it ends at this moment
    first = next((one for one in found if one.rank == 0), None)
    if first is None:
        raise LookupError(
            f"no live run writes into {output_dir}: {_folder(output_dir)} names no rank 0; expected the "
            "run.output_dir of a run that goes on"
        )
    return sorted((one for one in found if one.rank < first.world_size), key=lambda one: one.rank)


def stacks_folder(output_dir: Path, request: str) -> Path:
    """Where the stacks of one request are."""
    return output_dir / "stacks" / request


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def _folder(output_dir: Path) -> Path:
    return output_dir / "control"


def _requests(output_dir: Path) -> list[str]:
    try:
        return os.listdir(_folder(output_dir) / "requests")
    except OSError:
        return []


def _remove_empty(output_dir: Path) -> None:
    for folder in (_folder(output_dir) / "requests", _folder(output_dir)):
        with suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def _new_request() -> str:
    return f"{time.strftime('%Y-%m-%dT%H-%M-%S')}.{os.getpid()}"


def _ask(output_dir: Path, name: str, content: dict[str, int]) -> Path:
    file = _folder(output_dir) / "requests" / name
    write_atomically(file, json.dumps(content) + "\n")
    return file

"""How a run stops so that it can be continued, and what status.json says of it meanwhile."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_laser.config import RunConfig
from megatron_laser.errors import UserError
from megatron_laser.run.output_folder import STOPPED, ClaimedFolder
from megatron_laser.run.status import StatusFile, read_status
from megatron_laser.run.stop_signals import StopSignals
from megatron_laser.run.time_limit import TimeLimit

logger = logging.getLogger(__name__)


class Stopping:
    """One rank's word on where the run is and what a stop does there; on rank 0 it is written to status.json.

    step: the last complete one. checkpoint: the step of the last published one, None without one.
    """

    def __init__(self, config: RunConfig, signals: StopSignals) -> None:
        self.signals = signals
        self.step = 0
        self.checkpoint: int | None = None
        self._config = config
        self._steps = config.run.steps
        self._first = 0  # the last step before this start
        self._under_way = 0  # the step that is finished before a stop
        self._phase = "starting"
        self._running = False
        self._status: StatusFile | None = None
        self._folder: ClaimedFolder | None = None
        self._limit: TimeLimit | None = None
        self._save_began = 0.0
        signals.describe = self._describe
        signals.loses = self._loses
        signals.last_word = self._last_word

    def enter(self, phase: str) -> None:
        """The run begins `phase`, in words; see `Coordinator.phase`."""
        if phase not in ("", "start"):  # between two of them
            self._phase = phase
        if phase.startswith("saving "):
            self._save_began = time.monotonic()
        if self._limit is not None:
            self._limit.enter(phase)
        if self._status is not None:
            self._status.update(phase=self._phase)

    def settled(self, steps: int) -> None:
        """`run.steps` of the run, now that `run.epochs` have been made into them. On every rank."""
        self._steps = steps

    def open(self, folder: ClaimedFolder, world_size: int) -> None:
        """Rank 0 has claimed the folder: status.json begins, and the time limit holds."""
        self._folder = folder
        self._status = StatusFile(
            folder.path,
            own=self._owns_folder,
            state="starting",
            phase=self._phase,
            steps=self._steps,
            world_size=world_size,
            command=shell_command(),
        )
        self.signals.on_request(self._asked)
        if self._config.run.time_limit is not None:
            self._limit = TimeLimit(self._config.run.time_limit, self.signals.started)
            self._watch_limit()

    def resumed(self, step: int | None) -> None:
        """The run goes on behind `step`; None: it begins."""
        self.step = self._first = self._under_way = step or 0
        self.checkpoint = step
        self._update(step=self.step, checkpoint=self.checkpoint)

    def running(self, agree: Callable[[], bool]) -> None:
        """The start is over; raises StopNow if any rank was asked to stop meanwhile, which `agree` finds out."""
        self.signals.started_up(agree)
        self._running = True
        self._update(state="running")
        if self._limit is not None:
            self._limit.step_done("running", steps=0)

    def will_finish(self, step: int) -> None:
        """The rollout of `step` is there: from here a stop comes behind it."""
        self._under_way = step

    def recorded(self, step: int) -> None:
        """`step` is complete."""
        self.step = step
        self._update(step=step)

    def published(self, step: int) -> None:
        """The checkpoint of `step` is on the disk; from the thread that writes it."""
        self.checkpoint = step
        self._update(checkpoint=step)
        if self._limit is not None:
            self._limit.saved(time.monotonic() - self._save_began)

    def is_saved(self, step: int) -> bool:
        """Whether nothing was trained since what a continued run begins from: there is nothing to save."""
        return step in (self._first, self.checkpoint)

    def check_limit(self, step: int, *, evaluation: bool) -> None:
        """After `step`: ask to stop where `run.time_limit` has no room for another one."""
        if self._limit is None or self.signals.reason:
            return
        self._limit.step_done(self._phase, steps=step - self._first)
        self._watch_limit()
        if step < self._steps and not self._limit.has_room(evaluation=evaluation):
            self.signals.request(self._limit_reason())

    def stopped(self, step: int, reason: str) -> None:
        """The run has stopped and can be continued. On every rank."""
        self.signals.stopped = True
        self._close(state="stopped", step=step, reason=reason, exit_status=3)

    def finished(self) -> None:
        """Everything is done and written, by `run.early_stop` perhaps before the last of `run.steps`."""
        self._close(state="finished", step=self.step, reason="", exit_status=0)

    def leave(self) -> None:
        """The run is taken apart: whoever listens to requests listens no more."""
        self.signals.quiet()

    def ended(self, error: BaseException) -> None:
        """The run ends with `error`; nothing where it has stopped or finished before."""
        if self.signals.stops_with(error):
            if self._folder is not None:
                write_stopped(self._folder.path, self.step, self.signals.reason)
            self._close(state="stopped", reason=self.signals.reason, exit_status=3)
            return
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self._close(state="failed", reason=f"{name}{error}".strip(), exit_status=status)

    def _describe(self) -> str:
        """What a request to stop does now."""
        if not self._running:
            return f"stopping at once ({self._phase}); {self._nothing_new()}"
        if self._phase == "final report":
            return f"{self._all_done()}; the run ends behind the report"
        if self._phase.startswith(("export", "final evaluation")):
            return f"{self._all_done()}; stopping in the {self._phase}"
        step = max(self.step, self._under_way)
        if self.is_saved(step):
            return f"stopping now ({self._phase}); {self._nothing_new()}"
        return f"stopping after step {step}, saving (now: {self._phase})"

    def _all_done(self) -> str:
        if self.step < self._steps:  # by run.early_stop
            return f"the run has ended early, after step {self.step} of {self._steps}, and is saved"
        return f"all {self._steps} steps are done and saved"

    def _nothing_new(self) -> str:
        since = f"since step {self._first}, which is saved" if self._first else "yet"
        step = max(self.step, self._under_way)
        if step > self._first:
            since = f"since step {step}, which is saved"
        return f"nothing was trained {since}"

    def _loses(self) -> str:
        saved = self.checkpoint or 0
        last = max(self.step, self._under_way)
        if last <= saved:
            where = f"the checkpoint of step {saved}" if saved else "the start"
            return f"nothing is lost that was trained: nothing was since {where}"
        steps = f"step {last}" if last == saved + 1 else f"steps {saved + 1} to {last}"
        since = f"the checkpoint of step {saved} is the last one" if saved else "there is no checkpoint"
        return f"{steps} lost: {since}"

    def _last_word(self, status: int, reason: str) -> None:
        state = "stopped" if status in (0, 3) else "failed"
        if state == "stopped" and self._folder is not None:
            write_stopped(self._folder.path, self.step, self.signals.reason)
        self._close(state=state, reason=reason, exit_status=status or 3)

    def _owns_folder(self) -> bool:
        assert self._folder is not None
        try:
            return self._folder.intact()
        except (
            ValueError
        ):  # it was let go of, by a start that failed: the file is ours until another run writes it
            said = read_status(self._folder.path)
            return said is None or said.pid == os.getpid()

    def _asked(self, reason: str) -> None:
        self._update(state="stopping", reason=reason)

    def _watch_limit(self) -> None:
        assert self._limit is not None
        self.signals.set_limit(self._limit.latest_stop, self._limit_reason())

    def _limit_reason(self) -> str:
        return f"run.time_limit {self._config.run.time_limit:g} s"

    def _update(self, **changed: object) -> None:
        if self._status is not None:
            self._status.update(**changed)

    def _close(self, **last: object) -> None:
        self.signals.forget(self._asked)
        if self._status is not None:
            self._status.close(**last)


def write_stopped(folder: Path, step: int, reason: str) -> None:
    """The marker of a run that has stopped after `step` and can be continued."""
    note = {"step": step, "reason": reason}
    try:
        (folder / STOPPED).write_text(json.dumps(note) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written: %s", folder / STOPPED, error)


def shell_command() -> str:
    """What continues the run: this process's command or, under torchrun, that of torchrun on this node.

    Without --overwrite, with which it would begin anew.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        words = _command_of(os.getppid())
        if any("torchrun" in word or "torch.distributed.run" in word for word in words[:4]):
            if os.path.basename(words[1]) == "torchrun":
                words = ["torchrun", *words[2:]]
            return shlex.join(word for word in words if word != "--overwrite")
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        start = [_python(), "-m", program.parent.name]
    elif shutil.which(program.name):
        start = [program.name]
    else:
        start = [_python(), str(program)]
    return shlex.join([*start, *(word for word in sys.argv[1:] if word != "--overwrite")])


def _python() -> str:
    found = shutil.which("python")
    return "python" if found is not None and os.path.samefile(found, sys.executable) else sys.executable


def _command_of(pid: int) -> list[str]:
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    words = [os.fsdecode(part) for part in parts[:-1]]
    return [_python(), *words[1:]] if words else []

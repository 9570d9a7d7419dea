"""`GradingPool`: grades of many responses, each within its deadline; equal requests share one result."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import asdict
from itertools import repeat
from types import TracebackType
from typing import Any, TypeVar

from megatron_laser.rewards.adapters import split_kind
from megatron_laser.rewards.answer_forms import answer_form
from megatron_laser.rewards.arguments import Facts
from megatron_laser.rewards.grade import Grade, GradingPoolError
from megatron_laser.rewards.mathematics.boxed import extract_answer, gold_answer
from megatron_laser.rewards.mathematics.grading import quick_equal, quick_grade
from megatron_laser.rewards.registry import RewardFunction, is_math_verify, locate_reward
from megatron_laser.rewards.terms import PLAIN, RewardRule
from megatron_laser.rewards.workers.source_snapshot import SourceSnapshot
from megatron_laser.rewards.workers.worker_process import WorkerDied, WorkerSettings, WorkerTimeout
from megatron_laser.rewards.workers.worker_queue import WorkerQueue


class SharedResults:
    """A least-recently-used cache that also joins equal requests in flight. Thread-safe.

    Every `join` has a future of its own, so that one caller's cancellation is not another's.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._finished: OrderedDict[Hashable, Any] = OrderedDict()
        self._waiting: dict[Hashable, list[Future[Any]]] = {}
        self._lock = threading.Lock()

    def join(self, key: Hashable) -> tuple[Future[Any], bool]:
        """A future for the key's result, and whether the caller is the one who has to compute it."""
        future: Future[Any] = Future()
        with self._lock:
            if key in self._finished:
                self._finished.move_to_end(key)
                future.set_result(self._finished[key])
                return future, False
            waiting = self._waiting.setdefault(key, [])
            waiting.append(future)
            return future, len(waiting) == 1

    def finish(self, key: Hashable, value: Any, *, keep: bool) -> None:
        """Give everyone who waits for the key its result; `keep` it for those who come later."""
        with self._lock:
            waiting = self._waiting.pop(key, [])
            if keep and self._size > 0:
                self._finished[key] = value
                if len(self._finished) > self._size:
                    self._finished.popitem(last=False)
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(value)

    def fail(self, key: Hashable, error: BaseException) -> None:
        """Raise `error` in everyone who waits for the key."""
        with self._lock:
            waiting = self._waiting.pop(key, [])
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


logger = logging.getLogger(__name__)

TIMEOUT = Grade(0.0, "timeout")
CRASH = Grade(0.0, "crash")

_RESTART_SECONDS = 5.0  # allowance for replacing a killed worker (0.5 s on an idle machine)
_LOOK_SECONDS = 2.0  # between two looks at the user's files
_COMPLAINTS = 3  # log lines for each kind of trouble; the outcome counts in the metrics tell the rest
_Result = TypeVar("_Result")


class GradingPool:
    """Worker processes that grade responses.

    A bad item costs its own grade only: one that hangs ends at its deadline as `timeout`, one that raises,
    returns nonsense or kills its process as `crash`, and the worker is replaced. math_verify's quick
    decisions (no box, one spelling, plain numbers) and repeated pairs are settled in the calling thread within a
    fraction of a millisecond. Methods may be called from any thread; the workers end with this process.
    """

    def __init__(
        self,
        workers: int = 2,
        deadline: float = 5.0,
        function: str | RewardFunction = "math_verify",
        *,
        start_deadline: float = 60.0,
        memory_limit_gib: float | None = 4.0,
        max_processes: int | None = None,
        cache_size: int = 65536,
        log_failures: bool = True,
        rule: RewardRule = PLAIN,
    ) -> None:
        """Resolve the function and start the workers; returns when all are ready.

        Args:
            workers: number of processes.
            deadline: seconds for one item, from when a worker gets it.
            function: "math_verify", another registered name, "package.module:function",
                "path/to/file.py:function", or a function of a module's top level.
            start_deadline: seconds within which every worker must be ready.
            memory_limit_gib: address space of a worker, and of each process that it starts; what needs more ends in
                `crash`. None: no limit.
            max_processes: that the functions of one worker may have started at once; with more the worker is ended,
                and the outcome is `crash`. None: no limit.
            cache_size: grades kept for repeated (answer, reference) pairs; math_verify only, since a custom
                function need not be deterministic.
            log_failures: warn of the first responses that cannot be graded; `last_trouble` has the reason anyway.
            rule: further terms, and how the label is made.

        Raises:
            ValueError: a number is out of range.
            RewardSpecError: `function` cannot be resolved.
            GradingPoolError: the workers did not become ready; says why.
        """
        for name, value in (("workers", workers), ("deadline", deadline), ("start deadline", start_deadline)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"reward.{name}: expected a positive number, found {value!r}")
        self._is_math = is_math_verify(function) and rule.is_plain
        self._name = "math_verify" if self._is_math else locate_reward(function)
        # what answers are to the function, for votes
        self.form = answer_form(split_kind(self._name)[1])
        self._workers = int(workers)
        self._deadline = float(deadline)
        self._start_deadline = float(start_deadline)
        self._shared = SharedResults(cache_size)
        self._complaints: Counter[str] = Counter()
        self._complaints_lock = threading.Lock()
        self.last_trouble = ""  # why the last response that got no grade got none
        self._closed = False
        self._log_failures = log_failures
        self._snapshot = SourceSnapshot()
        self._next_look = 0.0
        settings = WorkerSettings(
            snapshot=self._snapshot,
            function=None if self._is_math else self._name,
            memory_limit=None if memory_limit_gib is None else int(memory_limit_gib * 2**30),
            start_deadline=self._start_deadline,
            max_processes=max_processes,
            rule=asdict(rule)
            | {"functions": {name: locate_reward(spec) for name, spec in rule.functions.items()}},
        )
        self._needs = settings.needs
        self._pool = WorkerQueue(self._workers, self._deadline, settings)

    @property
    def needs(self) -> frozenset[str]:
        """Which of `arguments.FACTS` the functions ask for."""
        return frozenset(self._needs)

    def submit(self, response: str, answer: str, facts: Facts | None = None) -> Future[Grade]:
        """Grade one response. The future raises GradingPoolError only: pool closed, or no worker can start.

        Args:
            response: the model's text.
            answer: the reference.
            facts: what functions may ask for besides; None: nothing is known, and one that asks ends in `crash`.

        Raises:
            GradingPoolError: the pool is closed.
        """
        if not self._is_math:
            self._look_for_edits()
            more = {} if facts is None or not self._needs else {"facts": facts.message(self._needs)}
            return self._ask("grade", response, answer, key=object(), keep=False, more=more)
        quick = quick_grade(response, answer)
        if quick is not None:
            return self._settled(quick)
        extracted, gold = extract_answer(response) or "", gold_answer(answer)  # quick_grade has settled ""
        return self._ask("grade", extracted, gold, key=("grade", extracted, gold), keep=True)

    def grade_many(
        self,
        items: Iterable[tuple[str, str]],
        deadline: float | None = None,
        *,
        facts: Sequence[Facts] | None = None,
    ) -> list[Grade]:
        """Grade (response, answer) pairs; the grades come in the same order.

        Args:
            facts: of each, as in `submit`.
            deadline: seconds for all of them; None: what they and those queued before them can take at worst.
                What is not graded by then is `timeout`.

        Raises:
            GradingPoolError: the pool is closed, or no worker can be started any more.
        """
        known: Iterable[Facts | None] = repeat(None) if facts is None else facts
        futures = [self.submit(*item, fact) for item, fact in zip(items, known)]
        return self._collect(futures, deadline, TIMEOUT)

    def equal_many(self, pairs: Iterable[tuple[str, str]], deadline: float | None = None) -> list[bool]:
        """Equality of normalised answers as `grade_math` decides it, whatever the pool's own function is.

        Args:
            deadline: as in `grade_many`. What cannot be compared in time is unequal.

        Raises:
            GradingPoolError: as in `grade_many`.
        """
        futures: list[Future[bool]] = []
        for left, right in pairs:
            quick = quick_equal(left, right)
            if quick is not None:
                futures.append(self._settled(quick))
                continue
            left, right = sorted((left, right))
            futures.append(self._ask("equal", left, right, key=("equal", left, right), keep=True))
        return self._collect(futures, deadline, False)

    def source_fingerprints(self) -> dict[str, str]:
        """Path -> hash of the user's code that grades, as it was when the pool started; {} for math_verify."""
        return self._snapshot.fingerprints()

    def say_if_edited_since(self, earlier: Mapping[str, str]) -> None:
        """Warn of files that are not what they were in an `earlier` pool's `source_fingerprints`."""
        now = self.source_fingerprints()
        edited = sorted(path for path in earlier.keys() & now.keys() if earlier[path] != now[path])
        if edited:
            logger.warning(
                "%s %s edited since the checkpoint was written: from here on rewards come from the new code",
                " and ".join(edited),
                "was" if len(edited) == 1 else "were",
            )

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._pool.pids()

    def close(self) -> None:
        """Kill the workers; what is not graded yet raises GradingPoolError. May be called again."""
        self._closed = True
        self._pool.close()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _settled(self, result: _Result) -> Future[_Result]:
        if self._closed:
            raise GradingPoolError("the grading pool is closed")
        future: Future[_Result] = Future()
        future.set_result(result)
        return future

    def _ask(
        self,
        kind: str,
        first: str,
        second: str,
        *,
        key: Hashable,
        keep: bool,
        more: Mapping[str, Any] | None = None,
    ) -> Future[Any]:
        future, first_to_ask = self._shared.join(key)
        if first_to_ask:
            try:
                reply = self._pool.submit({"kind": kind, "texts": [first, second], **(more or {})})
            except GradingPoolError as error:
                self._shared.fail(key, error)
                raise
            reply.add_done_callback(lambda done: self._finish(kind, second, key, keep, done))
        return future

    def _finish(
        self, kind: str, answer: str, key: Hashable, keep: bool, done: Future[dict[str, Any]]
    ) -> None:
        """Turn a worker's reply, or its end, into the result. Runs in the thread that owns the worker."""
        error = done.exception()
        if error is None:
            reply = done.result()
            trouble = reply.get("error")
            if trouble is None:
                result = reply["equal"] if kind == "equal" else Grade(**reply["grade"])
                self._shared.finish(key, result, keep=keep)
                if isinstance(result, Grade) and result.failed:
                    self._complain(result.outcome, "the function itself returned this outcome", answer)
                return
            outcome = CRASH
        elif isinstance(error, WorkerTimeout):
            trouble, outcome = str(error), TIMEOUT
        elif isinstance(error, WorkerDied):
            trouble, outcome = f"its process ended: {error}", CRASH
        else:
            self._shared.fail(key, error)
            return
        # not kept: a busy machine's time-out says nothing about the next attempt
        self._shared.finish(key, False if kind == "equal" else outcome, keep=False)
        self._complain(outcome.outcome, trouble, answer)

    def _collect(
        self, futures: list[Future[_Result]], deadline: float | None, late: _Result
    ) -> list[_Result]:
        if deadline is None:
            waiting = max(self._pool.queued(), sum(not future.done() for future in futures))
            rounds = math.ceil(waiting / self._workers) + 1  # one more: what the workers are busy with
            deadline = self._start_deadline + rounds * (self._deadline + _RESTART_SECONDS)
        wait_for(futures, timeout=deadline)
        results = [future.result() if future.done() else late for future in futures]
        missing = sum(not future.done() for future in futures)
        if missing:
            self._complain(
                "timeout", f"{missing} of {len(futures)} items left after {deadline:g} s in all", ""
            )
        return results

    def _look_for_edits(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for path in self._snapshot.newly_edited():
            logger.warning(
                "%s was edited: this run goes on grading with the code that it started with; stop and resume it to use "
                "the new one (said once)",
                path,
            )

    def _complain(self, outcome: str, trouble: str, answer: str) -> None:
        with self._complaints_lock:
            self.last_trouble = f"{outcome}: {trouble}"
            self._complaints[outcome] += 1
            count = self._complaints[outcome]
        if self._log_failures and count <= _COMPLAINTS:
            last = "; further ones are only counted" if count == _COMPLAINTS else ""
            logger.warning(
                "grading with %s: %s: %s (reference %.80r)%s", self._name, outcome, trouble, answer, last
            )

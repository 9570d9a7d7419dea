"""Runs a user's function for every sample of a rollout: side by side, each with a deadline, failures counted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from megatron_laser.errors import UserError
from megatron_laser.rewards.workers.user_code import described, is_users_code
from megatron_laser.rollout.client.event_loop import LoopThread, all_or_first_error
from megatron_laser.rollout.engine import RolloutEngine, StopEarly, StoppedEarly
from megatron_laser.rollout.function.conversation import InvalidSample, as_generation
from megatron_laser.rollout.function.engine_requests import Requests, requests_to
from megatron_laser.rollout.function.handle import FunctionEngine
from megatron_laser.rollout.function.loading import load_function
from megatron_laser.types import Generation, Prompt, SamplingParams

logger = logging.getLogger(__name__)

FailureKind = Literal["timeout", "error", "invalid"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)

_LEAVE_SECONDS = 2.0  # for a function that is cancelled to end
_STOP_SECONDS = 20.0  # for all functions and the engine's call
_LOOK_EVERY = 0.5  # seconds
_BLOCKED_SLACK = 10.0  # seconds beyond the deadline after which the event loop counts as blocked
_TOOL_THREADS = 64  # of asyncio.to_thread: tools that block


class FunctionFailed(UserError, RuntimeError):
    """`rollout.function` gave no sample that could be trained on, or blocks the event loop."""


class SampleFunction:
    """A `rollout.function` over an engine.

    Attributes:
        last_trouble: the last failure, with its place in the user's code.
    """

    def __init__(
        self,
        spec: str,
        engine: RolloutEngine,
        *,
        options: Mapping[str, Any],
        deadline: float,
        tokenizer: Any,
        vocab_size: int,
        longest: int,
        max_positions: int,
        score_token_id: int | None,
    ) -> None:
        """
        Args:
            spec: `rollout.function`.
            options: `rollout.function_options`.
            deadline: `rollout.function_deadline`, seconds for one sample.
            longest: tokens of the longest prompt and response together.
            max_positions: tokens that the model can read.

        Raises:
            FunctionSpecError: see `load_function`.
        """
        self._function = load_function(spec, options)
        self._spec = spec
        self._options = dict(options)
        self._engine = engine
        self._deadline = deadline
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._longest = longest
        self._max_positions = max_positions
        self._score_token_id = score_token_id
        self._said: set[str] = set()
        self._beat = 0.0
        self.last_trouble = ""
        self._thread = LoopThread("rollout function")
        self._tools = concurrent.futures.ThreadPoolExecutor(_TOOL_THREADS, thread_name_prefix="rollout tools")
        self._thread.loop.set_default_executor(self._tools)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None],
        on_failed: Callable[[int, int, FailureKind], None],
        skip: Collection[tuple[int, int]] = (),
        stop: StopEarly | None = None,
    ) -> None:
        """`samples_per_prompt` samples of each prompt, but for the (prompt index, sample index) in `skip`.

        Args:
            deadline: seconds for all of them.
            on_finished, on_failed: called with prompt index and sample index as each ends, in another thread.
            stop: end soon, by StoppedEarly.

        Raises:
            TimeoutError: not done in time.
            FunctionFailed: a function blocks all others.
            What the engine raises: WeightsNeeded and the like; what has finished by then has been told.
        """
        ends = time.monotonic() + deadline
        places = [
            (p, s)
            for p in range(len(prompts))
            for s in range(sampling.samples_per_prompt)
            if (p, s) not in skip
        ]
        self._beat = time.monotonic()
        left = threading.Event()

        async def work() -> None:
            try:
                await self._run(prompts, places, sampling, ends, on_finished, on_failed)
            finally:
                left.set()

        future = asyncio.run_coroutine_threadsafe(work(), self._thread.loop)
        while True:
            try:
                return future.result(timeout=_LOOK_EVERY)
            except concurrent.futures.TimeoutError:
                if future.done():
                    return future.result()  # done by now, or ended by a TimeoutError of its own
            except BaseException:
                future.cancel()
                raise
            if stop is not None and stop.is_set:
                future.cancel()
                left.wait(_STOP_SECONDS)  # nothing asks the engine any more
                raise StoppedEarly("stopped while rollout.function was still running")
            silent = time.monotonic() - self._beat
            if silent > self._deadline + _BLOCKED_SLACK:
                future.cancel()
                raise FunctionFailed(
                    f"rollout.function {self._spec!r} has blocked all samples for {silent:.0f} s{self._where()}: await "
                    "what takes time, and put calls that block into `await asyncio.to_thread(call, ...)`"
                )

    def close(self) -> None:
        """End the event loop, and what still runs in it."""

        async def leave() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=_LEAVE_SECONDS)

        future = asyncio.run_coroutine_threadsafe(leave(), self._thread.loop)
        try:
            future.result(timeout=2 * _LEAVE_SECONDS)
        except concurrent.futures.TimeoutError:
            logger.warning("rollout.function %r does not end", self._spec)
        self._tools.shutdown(wait=False, cancel_futures=True)
        self._thread.stop()

    async def _run(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[tuple[int, int]],
        sampling: SamplingParams,
        ends: float,
        on_finished: Callable[[int, int, Generation], None],
        on_failed: Callable[[int, int, FailureKind], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        requests = requests_to(self._engine, sampling, ends=ends, max_positions=self._max_positions)
        requests.begun(len(places))
        broken: asyncio.Future[None] = loop.create_future()

        async def one(place: tuple[int, int]) -> None:
            try:
                found = await self._sample(prompts[place[0]], place, sampling, requests, ends, broken)
            finally:
                requests.ended()
            if isinstance(found, Generation):
                on_finished(*place, found)
            else:
                on_failed(*place, found)

        def late(waiting: int, all_of_them: int) -> str:
            return (
                f"rollout.function: {waiting} of {all_of_them} samples were not done within rollout.deadline"
            )

        heart = asyncio.create_task(self._heart())
        try:
            tasks = {asyncio.create_task(one(place)): place for place in places}
            await all_or_first_error(tasks, ends, late)
        finally:
            heart.cancel()
            if not broken.done():
                broken.cancel()
            elif not broken.cancelled():
                broken.exception()  # heard
            await requests.close()

    async def _sample(
        self,
        prompt: Prompt,
        place: tuple[int, int],
        sampling: SamplingParams,
        requests: Requests,
        ends: float,
        broken: asyncio.Future[None],
    ) -> Generation | FailureKind:
        """One sample, or how it failed. Raises what the engine raised."""

        def fail(error: Exception) -> None:
            if not broken.done():
                broken.set_exception(error)

        seconds = min(self._deadline, ends - time.monotonic())
        engine = FunctionEngine(
            requests,
            prompt,
            sampling,
            place=place,
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            longest=self._longest,
            score_token_id=self._score_token_id,
            ends=time.monotonic() + seconds,
            fail=fail,
        )
        # A copy of the ids: they are the group's, and the function may do anything with its own.
        own = replace(prompt, token_ids=list(prompt.token_ids))
        task = asyncio.create_task(self._call(engine, own, sampling))
        try:
            both: set[asyncio.Future[Any]] = {task, broken}
            done, _ = await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            engine.close()
            await _leave(task)
        if broken.done():
            broken.result()
        if task not in done:
            return self._failed("timeout", f"no sample within rollout.function_deadline {self._deadline:g} s")
        if task.cancelled():
            return self._failed("error", "CancelledError: the function has cancelled itself")
        error = task.exception()
        if error is None:
            return task.result()
        return self._failed("invalid" if isinstance(error, InvalidSample) else "error", described(error))

    async def _call(self, engine: FunctionEngine, prompt: Prompt, sampling: SamplingParams) -> Generation:
        try:
            result = await self._function(engine, prompt, sampling, **self._options)
        except (SystemExit, KeyboardInterrupt) as error:  # they would end the event loop
            raise RuntimeError(described(error)) from error
        generation = as_generation(
            result, sampling, vocab_size=self._vocab_size, weight_version=self._engine.version
        )
        token = sampling.score_token_id
        if token is not None and generation.is_scored(sampling.stop_token_ids):
            generation.zc_logprob = await engine.score([*prompt.token_ids, *generation.response_ids.tolist()])
        return generation

    def _failed(self, kind: FailureKind, why: str) -> FailureKind:
        """Note a failure; the first of each kind is said."""
        self.last_trouble = f"{kind}: {why}"
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(
                "rollout.function %r: %s; such samples are left out of the step, and function_failed_%s counts them "
                "(said once)",
                self._spec,
                self.last_trouble,
                kind,
            )
        return kind

    async def _heart(self) -> None:
        """Show that the event loop is not blocked."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY)

    def _where(self) -> str:
        """What the event loop's thread does just now, in the user's code."""
        frame = sys._current_frames().get(self._thread.ident)
        for line in reversed(traceback.extract_stack(frame) if frame is not None else []):
            if is_users_code(line.filename):
                return f" ({line.filename}:{line.lineno} in {line.name})"
        return ""


async def _leave(task: asyncio.Task[Any]) -> None:
    """Cancel a function that has not ended; one that does not let itself be cancelled is left behind."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait({task}, timeout=_LEAVE_SECONDS)
    if task.done() and not task.cancelled():
        task.exception()  # heard, and of no interest: its time was up


def failure_counts(outcomes: Counter[str]) -> dict[str, int]:
    """Failures of each kind among the outcomes of a step's samples."""
    return {kind: outcomes[failed_outcome(kind)] for kind in FAILURE_KINDS}


def failed_outcome(kind: str) -> str:
    """The `Sample.outcome` of a sample that the function did not make."""
    return f"function_{kind}"

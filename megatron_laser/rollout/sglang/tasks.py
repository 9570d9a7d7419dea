"""Waiting for many asyncio tasks at once, and trying one thing again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from megatron_laser.rollout.sglang.errors import ServerError, ServerRefused

_CANCEL_SECONDS = 15.0  # below the slack of whoever waits in another thread: it shall hear the reason


def cancelling() -> bool:
    """Whether the current task itself is being cancelled, and not just something that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def all_or_first_error(
    tasks: Mapping[asyncio.Task[None], Any], ends: float, late: Callable[[int, int], str]
) -> None:
    """Wait for all tasks; the first error, or the end of time, cancels the others.

    Raises TimeoutError(late(unfinished, all)) at `ends` by time.monotonic().
    """
    if not tasks:
        return
    try:
        done, waiting = await asyncio.wait(
            tasks, timeout=max(0.0, ends - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION
        )
        for task in done:
            task.result()
        if waiting:
            raise TimeoutError(late(len(waiting), len(tasks)))
    finally:
        waiting = {task for task in tasks if not task.done()}
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting, timeout=_CANCEL_SECONDS)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # heard: a thousand requests that fail alike are one error, not a thousand lines


async def retried(attempt: Callable[[], Any], note: Callable[[BaseException], None]) -> Any:
    """`attempt` until it succeeds, with jitter between; what would only repeat itself ends it.

    Whoever waits for it cancels it at the end of time; a request whose own time is up just then ends with that error
    instead, and is not repeated either. `note` is called with the error before each further attempt.
    """

    def before(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None:
            note(error)

    retrying = AsyncRetrying(
        retry=retry_if_exception(
            lambda error: (
                isinstance(error, ServerError) and not isinstance(error, ServerRefused) and not cancelling()
            )
        ),
        wait=wait_random_exponential(multiplier=0.1, max=5.0),
        before_sleep=before,
        reraise=True,
    )
    return await retrying(attempt)

"""An event loop in a thread of its own, for code that is not asynchronous; waiting for many tasks on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

_CANCEL_SECONDS = 15.0  # below the slack of whoever waits in another thread: it shall hear the reason

T = TypeVar("T")

SLACK = 30.0  # seconds that the work gets to report a deadline itself


class LoopThread:
    """Starts at once; `stop` ends it."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        """The thread's, as `sys._current_frames` names it."""
        return self._thread.ident or 0

    def run(self, work: Coroutine[Any, Any, T], deadline: float, late: Callable[[], str]) -> T:
        """The result of `work`, which runs in the thread.

        Raises what it raises, and TimeoutError(late()) a little after `deadline` seconds.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout=deadline + SLACK)
        except concurrent.futures.TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise TimeoutError(late()) from error
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop; waits up to ten seconds."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10.0)

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


class OneThread:
    """A thread beside the current event loop, for calls that must not hold it up; one after the other."""

    def __init__(self, name: str) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=name)

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises. It is called even if whoever waits for it is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self._thread.submit(function, *arguments)))

    async def end(self) -> None:
        """Wait for the calls that are under way or waiting; there are no more after them."""
        await asyncio.wrap_future(self._thread.submit(lambda: None))
        self._thread.shutdown(wait=False)


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

"""Results by key: kept for a while when finished, shared while they are being computed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any


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

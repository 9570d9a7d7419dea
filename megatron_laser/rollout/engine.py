"""What the training loop asks of anything that generates: token ids in, token ids and log-probs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from megatron_laser.types import Generation, SamplingParams

if TYPE_CHECKING:
    import torch


class StoppedEarly(RuntimeError):
    """Generation ended because its `stop` was set; `on_finished` has heard of what was complete."""


class StopEarly:
    """Tells an engine, from any thread or signal handler, that what has finished by now is enough."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal may come while this thread holds it
        self._set = False
        self._callbacks: list[Callable[[], object]] = []

    def set(self) -> None:
        """Enough; further calls do nothing."""
        with self._lock:
            if self._set:
                return
            self._set = True
            callbacks = self._callbacks
        for callback in callbacks:
            callback()

    @property
    def is_set(self) -> bool:
        """Whether somebody has said so."""
        return self._set

    def on_set(self, callback: Callable[[], object]) -> None:
        """Call `callback` when it is set; at once if it is (then perhaps twice)."""
        with self._lock:
            self._callbacks.append(callback)
            if not self._set:
                return
        callback()


def takes_seeds(engine: object) -> bool:
    """Whether `sampling.seed` decides what `engine` samples; servers say no unless their inference is deterministic."""
    return bool(getattr(engine, "takes_seeds", True))


def watched(engine: object) -> AbstractContextManager[None]:
    """While it lasts, `engine` looks at how busy its servers are, where it has some; see `SglangEngine.watched`."""
    found: AbstractContextManager[None] = getattr(engine, "watched", nullcontext)()
    return found


@runtime_checkable
class RolloutEngine(Protocol):
    """A generator that always knows which weights it holds.

    All calls are made on global rank 0 and every call has a deadline in seconds; a call that cannot keep it
    raises TimeoutError.
    """

    @property
    def version(self) -> int:
        """Version of the weights that the next call will use; 0 for those it was started with."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation]]:
        """`samples_per_prompt` responses for each prompt, in order.

        `on_finished(prompt index, sample index, generation)` is called as each response ends, so that grading
        can start before the batch is complete; perhaps from another thread. Raises StoppedEarly soon after `stop`
        is set.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        """log pi(token_id | sequence) at temperature 1, for prompt + response ids ending in a stop token."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by a stream of (Hugging Face name, full tensor) and take on `version`."""
        ...

    def close(self) -> None:
        """Release processes and memory; safe to call twice."""
        ...


@runtime_checkable
class ResumableEngine(RolloutEngine, Protocol):
    """An engine that can be stopped early and go on with what was unfinished."""

    def generate_some(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        resume: Mapping[tuple[int, int], Generation] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation | None]]:
        """As `generate`, until `stop` is set: the rest is unfinished (`abort`) or None where nothing was begun.

        Args:
            resume: (prompt index, sample index) -> what an earlier call had of it. Finished ones are returned
                as they are, without a call of `on_finished`; unfinished ones are continued.
        """
        ...

    def take_metrics(self) -> dict[str, float]:
        """What happened since the last call, as flat metrics."""
        ...

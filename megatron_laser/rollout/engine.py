"""What the training loop asks of anything that generates: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from megatron_laser.types import Generation, SamplingParams

if TYPE_CHECKING:
    import torch


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
    ) -> list[list[Generation]]:
        """`samples_per_prompt` responses for each prompt, in order.

        `on_finished(prompt index, sample index, generation)` is called as each response ends, so that grading
        can start before the batch is complete.
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

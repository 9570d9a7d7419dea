"""A `rollout.function` where an engine is expected: evaluations, which know prompts by their token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_laser.rollout.engine import RolloutEngine, StopEarly
from megatron_laser.rollout.function.runner import FailureKind, SampleFunction
from megatron_laser.rollout.token_scores import ScoresByEngine
from megatron_laser.types import Generation, Prompt, SamplingParams


class FunctionAsEngine(ScoresByEngine):
    """Generates by the function and scores by the engine. A sample that the function does not make is an empty
    response, which counts as wrong."""

    def __init__(self, function: SampleFunction, engine: RolloutEngine, prompts: Sequence[Prompt]) -> None:
        """`prompts`: all that will be asked for. Of two with the same token ids the function sees the first."""
        super().__init__(engine)
        self._function = function
        self._engine = engine
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        for prompt in prompts:
            self._prompts.setdefault(tuple(prompt.token_ids), prompt)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine.generate`. Raises as `SampleFunction.generate` does."""
        found: dict[tuple[int, int], Generation] = {}

        def finished(prompt: int, sample: int, generation: Generation) -> None:
            found[prompt, sample] = generation
            if on_finished is not None:
                on_finished(prompt, sample, generation)

        def failed(prompt: int, sample: int, kind: FailureKind) -> None:
            nothing = Generation([], [], "length", self._engine.version)  # type: ignore[arg-type]
            finished(prompt, sample, nothing)

        self._function.generate(
            [self._prompts[tuple(ids)] for ids in prompts],
            sampling,
            deadline=deadline,
            on_finished=finished,
            on_failed=failed,
            stop=stop,
        )
        samples = range(sampling.samples_per_prompt)
        return [[found[prompt, sample] for sample in samples] for prompt in range(len(prompts))]

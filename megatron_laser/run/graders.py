"""Grading pools for sources of problems that are not judged by `reward.function`."""

from __future__ import annotations

from collections.abc import Callable

from megatron_laser.config import RunConfig
from megatron_laser.rewards import GradingPool
from megatron_laser.run.inputs import RunInputs


def open_graders(
    config: RunConfig, inputs: RunInputs, close_later: Callable[[str, Callable[[], object]], None]
) -> dict[str, GradingPool]:
    """A pool of `reward.workers` for each further verifier, by its name: one that hangs holds up no other's responses.

    Args:
        close_later: is given the name and the closing of each pool as it is opened.

    Raises:
        RewardSpecError, GradingPoolError: as `GradingPool`.
    """
    prompts = [*inputs.train, *(inputs.validation or ()), *(inputs.test or ())]
    pools: dict[str, GradingPool] = {}
    for function in sorted({prompt.reward for prompt in prompts} - {""}):
        settings = config.reward
        pools[function] = GradingPool(settings.workers, settings.deadline, function)
        close_later(f"grading workers of {function}", pools[function].close)
    return pools

"""Grading pools as a run's settings have them: of `reward.function`, and of sources with a verifier of their own."""

from __future__ import annotations

from collections.abc import Callable

from megatron_laser.config import RunConfig
from megatron_laser.config.schema.inputs import RewardConfig
from megatron_laser.rewards import GradingPool, reward_rule
from megatron_laser.run.inputs import RunInputs


def open_pool(settings: RewardConfig, function: str = "") -> GradingPool:
    """`reward.workers` processes with the limits of `reward`, for `reward.function` or another one in its place.

    Raises:
        RewardSpecError, GradingPoolError: as `GradingPool`.
    """
    return GradingPool(
        settings.workers,
        settings.deadline,
        function or settings.function,
        memory_limit_gib=settings.memory_limit_gib,
        max_processes=settings.max_processes,
        rule=reward_rule(settings),
    )


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
        pools[function] = open_pool(config.reward, function)
        close_later(f"grading workers of {function}", pools[function].close)
    return pools

"""`rollout.function`: samples made by a user's async function, of several turns, with tools, with an environment."""

from megatron_laser.rollout.function.conversation import Conversation, FunctionSample, InvalidSample, Turn
from megatron_laser.rollout.function.handle import FunctionEngine
from megatron_laser.types import Prompt, SamplingParams

__all__ = [
    "Conversation",
    "FunctionEngine",
    "FunctionSample",
    "InvalidSample",
    "Prompt",
    "SamplingParams",
    "Turn",
]

"""A calculator for the small example: the policy writes an addition, and what stands behind its `=` is written for it.

    Which 3 digits of 38596 add up to 17?      ->      3+5+9= 17 ,\\boxed{359}

Only `17` is the calculator's. As `rollout.function` of a run (docs/rollout.md says what that is):

    python -m megatron_laser train examples/tiny_sum/laser.yaml \\
        rollout.function=examples/tiny_sum/calculator.py:calculator run.output_dir=runs/tiny_sum/calculator
"""

from __future__ import annotations

import re

from megatron_laser.rollout.function import Conversation, FunctionEngine, Prompt, SamplingParams

_ADDITION = re.compile(r"(\d(?:\+\d)*)=$")


async def calculator(engine: FunctionEngine, prompt: Prompt, sampling: SamplingParams) -> Conversation:
    """One response. The policy is stopped at each `=`, gets the sum, or a `?` for what is no addition, and goes on."""
    call = engine.encode("=")
    talk = Conversation(prompt, sampling)
    while talk.tokens_left > 0:
        turn = await engine.generate(talk.ids, stop_token_ids=call)
        talk.sampled(turn)
        if turn.ids[-1:] != tuple(call):
            break  # the policy has ended the response, or its length has
        if talk.tokens_left > 0:
            answer = added(engine.decode(talk.response_ids))
            # Two digits are one token behind `=` alone (vocabulary.py).
            talk.environment(engine.encode(f"={answer}")[len(call) :])
    return talk


def added(text: str) -> str:
    """The sum of the addition that `text` ends with, before its `=`; `?` where there is none."""
    found = _ADDITION.search(text)
    total = sum(map(int, found[1].split("+"))) if found else 0
    return str(total) if 0 < total <= 26 else "?"  # the vocabulary's largest number

"""Exact match: right is a response whose last line with text is the reference, but for case and spaces.

reward:                    # in the YAML of a recipe beside this folder: paths start there
  function: ../rewards/exact_match.py:exact_match
  terms: {reward: 1.0, brief: {function: ../rewards/exact_match.py:brief, weight: 0.1}}
"""

from __future__ import annotations

from megatron_laser.rewards import Grade


def exact_match(response: str, answer: str) -> Grade:
    """1 or 0; the line is also what the response votes for."""
    lines = [line for line in map(_plain, response.splitlines()) if line]
    if not lines:
        return Grade(0.0, "no_answer")
    right = lines[-1] == _plain(answer)
    return Grade(float(right), "correct" if right else "wrong", answer=lines[-1])


def brief(num_tokens: int, finish_reason: str) -> float:
    """A term besides: from 1 for nothing at all to 0 for 256 tokens and more, and 0 for what was cut off."""
    return max(0.0, 1.0 - num_tokens / 256) if finish_reason == "stop" else 0.0


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())

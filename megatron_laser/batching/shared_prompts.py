"""What prompts share, and which samples are scheduled and packed together because of it: pure functions.

The samples of a group have one prompt. Packed together, its tokens go through the model once, and every response
attends to them (`packing.pack`). So a group, or a piece of one, is scheduled as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

SampleIndexes = tuple[int, ...]
# Tokens that prompts have to begin with alike, to be worth a sequence, or a forward pass, of their own.
_MIN_COMMON = 16


def common_beginning(prompts: Sequence[npt.NDArray[np.integer] | Sequence[int]]) -> int:
    """How many tokens all of several prompts begin with, short of the shortest one; 0 where they are too few."""
    shortest = min(map(len, prompts), default=0)
    if len(prompts) < 2 or shortest <= _MIN_COMMON:
        return 0
    ids = np.array([np.asarray(prompt[: shortest - 1]) for prompt in prompts])
    differ = (ids != ids[0]).any(axis=0)
    common = int(differ.argmax()) if differ.any() else shortest - 1
    return common if common >= _MIN_COMMON else 0


def unit_tokens(prompt: int, responses: Sequence[int]) -> int:
    """Tokens of responses that are packed behind one prompt; its last token stands before each of them again.

    A single response is packed as ever, and so is a prompt of one token, of which nothing would be left to share.
    """
    if len(responses) == 1 or prompt == 1:
        return len(responses) * prompt + sum(responses)
    return prompt - 1 + len(responses) + sum(responses)


def shared_units(
    group_ids: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    budget: int,
    least: int,
) -> list[SampleIndexes]:
    """Samples that are packed behind one prompt, in order: each group, cut into as few pieces as will do.

    A piece fits the budget, or is one sample, and its responses stand in the batch next to each other.

    Args:
        group_ids: of each sample; samples of a group next to each other.
        budget: tokens of a micro-batch.
        least: pieces that are wanted, about: groups are cut alike, and none beyond its samples.
    """
    groups = [list(run) for _, run in groupby(range(len(group_ids)), key=group_ids.__getitem__)]
    each = -(-least // len(groups)) if groups else 1
    units: list[SampleIndexes] = []
    for members in groups:
        prompt = prompt_lengths[members[0]]
        count = min(each, len(members))
        while count < len(members) and any(
            unit_tokens(prompt, [response_lengths[i] for i in piece]) > budget and len(piece) > 1
            for piece in _cut(members, count)
        ):
            count += 1
        units += [tuple(piece) for piece in _cut(members, count)]
    return units


def _cut(members: Sequence[int], pieces: int) -> list[Sequence[int]]:
    """Runs of as even numbers as possible."""
    edges = [len(members) * piece // pieces for piece in range(pieces + 1)]
    return [members[first:last] for first, last in pairwise(edges)]

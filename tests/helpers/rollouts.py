"""Rollout batches made by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

STOP = 1


@dataclass(frozen=True)
class Response:
    """Lengths and fate of one response; it ends in STOP unless it is truncated."""

    length: int
    right: bool
    truncated: bool = False


#: A right, a wrong and a truncated response of so many tokens.
R, W, T = (lambda n: Response(n, True)), (lambda n: Response(n, False)), (lambda n: Response(n, False, True))
#: Rollout batches of four groups: all right, all wrong, truncated and one-token responses are among them.
STEPS = [
    [
        [R(5), W(12), R(3), T(20)],
        [W(2), W(9), R(14), W(6)],
        [R(4), R(4), T(16), W(1)],
        [W(7), R(11), W(3), R(8)],
    ],
    [
        [W(5), W(6), W(7), W(8)],
        [R(2), R(9), T(13), W(6)],
        [R(3), W(10), R(5), R(1)],
        [T(9), T(9), W(4), R(2)],
    ],
    [[R(15), W(3)], [W(2), R(8), W(4), R(6), T(12)], [R(7), W(7), R(7), W(9)], [W(1), W(5), R(17), R(2)]],
]


def rollout_batch(
    groups: Sequence[Sequence[Response]],
    *,
    seed: int = 0,
    vocab_size: int = 250,
    prompt_lengths: Sequence[int] | None = None,
    logprobs: tuple[float, float] = (-5.0, 0.5),
) -> FlatBatch:
    """Random tokens (never 0 or STOP inside a response), rollout log-probs ~ normal(*logprobs)."""
    rng = np.random.default_rng(seed)
    batch = RolloutBatch(step=1, weight_version=0)
    for row, responses in enumerate(groups):
        length = int(rng.integers(2, 9)) if prompt_lengths is None else prompt_lengths[row]
        prompt = rng.integers(2, vocab_size, length).tolist()
        group = Group(Prompt(row, "", "", prompt), [])
        for response in responses:
            ids = rng.integers(2, vocab_size, response.length).tolist()
            if not response.truncated:
                ids[-1] = STOP
            group.samples.append(
                Sample(
                    prompt_ids=prompt,
                    generation=Generation(
                        ids,
                        rng.normal(*logprobs, response.length).tolist(),
                        "length" if response.truncated else "stop",
                        weight_version=0,
                    ),
                    text="",
                    scored=not response.truncated,
                    reward=float(response.right),
                    outcome="correct" if response.right else "wrong",
                )
            )
        batch.groups.append(group)
    return flatten(batch)

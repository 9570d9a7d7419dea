"""How a response's score is read of any engine: one token behind its end, or several, or one place before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_laser.algorithms.readouts import ScoreKind
from megatron_laser.algorithms.self_reward import self_reward_scores
from megatron_laser.config import ConfigError, RunConfig, resolve_score_token
from megatron_laser.config.readouts import readouts
from megatron_laser.rollout.token_scores import Scores, token_scores


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """The first entry of `laser.readouts`, with token ids.

    token_ids: what is read; () for no score. ref_logprob: c_ref in nats; None: the log-prob is read, and no score made.
    targets: the scale. before_end: in the distribution that the last token was sampled from.
    """

    token_ids: tuple[int, ...]
    ref_logprob: float | None
    beta: float
    targets: tuple[float, float] = (1.0, 0.0)
    kind: ScoreKind = "scaled_logratio"
    before_end: bool = False

    @classmethod
    def of(cls, config: RunConfig, score_token_id: int | None, *, folder: Path | None = None) -> ScoreRule:
        """Of a run's settings.

        Args:
            score_token_id: the first token; None: no score.
            folder: whose tokenizer names the others; None: `model.path`.
        """
        found = readouts(config)
        if score_token_id is None or not found:
            laser = config.laser
            only = () if score_token_id is None else (score_token_id,)
            return cls(only, laser.ref_logprob, laser.beta, laser.targets)
        first = found[0]
        # A second token with a scaled log-ratio is for its loss alone.
        others = () if first.score == "scaled_logratio" else first.tokens[1:]
        ids = (score_token_id, *(token_id(folder or config.model.path, other) for other in others))
        before_end = first.position == "before_eos"
        return cls(ids, first.ref_logprob, first.beta, first.targets, first.score, before_end)

    @property
    def is_plain(self) -> bool:
        """Whether it is one token's log-prob behind the end, which engines may return with a response."""
        return len(self.token_ids) == 1 and not self.before_end

    @property
    def makes_scores(self) -> bool:
        """Whether a score is made of what is read; a log-ratio to an unknown reference is none."""
        return bool(self.token_ids) and (self.kind != "scaled_logratio" or self.ref_logprob is not None)

    def read(self, engine: Scores, sequences: Sequence[Sequence[int]], *, deadline: float) -> list[float]:
        """What scores are made of, for prompt + response ids with their end: log pi(z_c), or of several tokens the
        log-odds of the first one among them.

        deadline: seconds for all of it.
        """
        if self.before_end:
            sequences = [sequence[:-1] for sequence in sequences]
        rows = token_scores(engine, sequences, self.token_ids, deadline=deadline)
        return joined([list(column) for column in zip(*rows, strict=True)] or [[]])

    def score(self, value: float | None) -> float | None:
        """The score of what `read` gave, on the scale of its targets (1 right, 0 wrong)."""
        if value is None:
            return None
        right, wrong = self.targets
        if self.kind != "scaled_logratio":
            return (1.0 / (1.0 + math.exp(-max(min(value, 700.0), -700.0))) - wrong) / (right - wrong)
        if self.ref_logprob is None:
            return None
        read = torch.tensor(value, dtype=torch.float64)
        return float(
            self_reward_scores(read, ref_logprob=self.ref_logprob, beta=self.beta, targets=self.targets)
        )


def joined(columns: Sequence[list[float]]) -> list[float]:
    """What a score is made of, from the log-probs of each token of it, [tokens][sequences]: the one log-prob, or of
    several the log-odds of the first one among them."""
    if len(columns) == 1:
        return columns[0]
    read = torch.tensor(columns, dtype=torch.float64)
    values: list[float] = (read[0] - read[1:].logsumexp(dim=0)).tolist()
    return values


def token_id(folder: Path, token: int | str) -> int:
    """The id of a readout's token in a folder's tokenizer. Raises ConfigError where it has none."""
    found = resolve_score_token(folder, token, setting="laser.readouts").id
    if found is None:
        raise ConfigError([f"laser.readouts: token {token!r} is none of {folder}; give its id"])
    return found

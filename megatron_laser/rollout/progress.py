"""How far the collection of one step has come, what its grading came to, and how old its weights were."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_laser.algorithms.voting import pass_at_k
from megatron_laser.rollout.pending import OpenGroup
from megatron_laser.types import Generation, Group, WeightSpan

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a collector knows of a step before it is complete.

    before: the collector's state before the step. ends: by time.monotonic(). groups: what the step will train on.
    uniform: complete groups whose rewards are all equal, where those are dropped. lost: groups of which not one
    response could be graded. tried: prompts begun, and by the names of their sources. tokens_before: `sampled_tokens`
    of what earlier steps have left.
    """

    step: int
    before: dict[str, Any]
    ends: float
    groups: list[Group] = field(default_factory=list)
    uniform: list[Group] = field(default_factory=list)
    lost: list[Group] = field(default_factory=list)
    open: list[OpenGroup] = field(default_factory=list)
    tried: int = 0
    tried_by_source: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    tokens_before: int = 0

    def failures(self) -> Counter[str]:
        """Responses that could not be graded, by outcome; asked before a stand-in is in two lists."""
        return Counter(sample.outcome for group in self.complete() for sample in group.ungraded)

    def complete(self) -> list[Group]:
        """Every group whose responses have all ended; asked before a stand-in is in two lists."""
        return [*self.groups, *self.uniform, *self.lost]

    def drop_stale(self, max_staleness: int) -> None:
        """Have what open groups have of weights that are too old generated anew."""
        dropped = sum(group.drop_older_than(self.step - 1 - max_staleness) for group in self.open)
        if dropped:
            logger.info(
                "step %d: %d carried responses were older than rollout.max_staleness; generated anew",
                self.step,
                dropped,
            )

    def graded_metrics(self, stand_ins: Sequence[Group]) -> dict[str, float]:
        """Everything that was graded in this step, in the batch or not; asked before the stand-ins are in two lists.

        Args:
            stand_ins: those of `uniform` that the step trains on.

        Returns:
            groups_dropped, and of them groups_dropped_right (all right) and groups_dropped_wrong; accuracy_tried, the
            share of right responses among all that have a grade, of dropped groups too: the accuracy of the policy on
            the prompts that it tried, which the batch's own says nothing of where uniform groups are left out; and the
            metrics of `pass_metrics`, of the same.
        """
        return _graded(self.groups, self.uniform, stand_ins)

    def source_metrics(self, stand_ins: Sequence[Group]) -> dict[str, float]:
        """As `graded_metrics`, and prompts_tried, of each source under source/<name>/; {} where there is one only."""
        complete = {group.prompt.source for group in (*self.groups, *self.uniform)}
        metrics: dict[str, float] = {}
        for name in sorted((complete | set(self.tried_by_source)) - {""}):
            groups, uniform = (
                [group for group in part if group.prompt.source == name]
                for part in (self.groups, self.uniform)
            )
            found = {"prompts_tried": self.tried_by_source[name], **_graded(groups, uniform, stand_ins)}
            metrics |= {f"source/{name}/{metric}": value for metric, value in found.items()}
        return metrics


def sampled_tokens(groups: Iterable[Group | OpenGroup]) -> int:
    """Tokens that the policy has sampled for some groups, finished or not."""
    found = 0
    for group in groups:
        generations = (
            group.generations.values()
            if isinstance(group, OpenGroup)
            else [sample.generation for sample in (*group.samples, *group.ungraded)]
        )
        found += sum(int(generation.sampled_mask.sum()) for generation in generations)
    return found


def _graded(
    groups: Sequence[Group], uniform: Sequence[Group], stand_ins: Sequence[Group]
) -> dict[str, float]:
    used = {id(group) for group in stand_ins}
    dropped = [group for group in uniform if id(group) not in used]
    right = sum(all(sample.reward > 0.5 for sample in group.samples) for group in dropped)
    graded = [sample for group in (*groups, *uniform) for sample in group.samples]
    metrics: dict[str, float] = {
        "groups_dropped": len(dropped),
        "groups_dropped_right": right,
        "groups_dropped_wrong": len(dropped) - right,
    }
    if graded:
        metrics["accuracy_tried"] = sum(sample.reward > 0.5 for sample in graded) / len(graded)
    return metrics | pass_metrics([*groups, *uniform])


def pass_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """pass_at_<k>, the mean over groups of the chance that one of k responses is right, as in evaluations.

    k is 1, 2, 4, ... and the largest number of graded responses. A group with fewer than k has no part in it.
    """
    counts = [(len(group.samples), sum(sample.reward > 0.5 for sample in group.samples)) for group in groups]
    largest = max((n for n, _ in counts), default=0)
    ks = {2**power for power in range(largest.bit_length()) if 2**power <= largest} | {largest} - {0}
    metrics = {}
    for k in sorted(ks):
        chances = [pass_at_k(n, right, k) for n, right in counts if n >= k]
        metrics[f"pass_at_{k}"] = sum(chances) / len(chances)
    return metrics


def token_ages(generation: Generation, trained_version: int) -> list[tuple[int, int]]:
    """(steps behind `trained_version`, tokens) for each span of a response."""
    spans = generation.spans or (WeightSpan(generation.weight_version, len(generation.response_ids)),)
    return [(trained_version - span.version, span.tokens) for span in spans]


def staleness_metrics(groups: Iterable[Group], *, trained_version: int) -> dict[str, float]:
    """Mean and largest age of the tokens of a batch, in steps; 0 is on-policy."""
    ages = [
        age
        for group in groups
        for sample in group.samples
        for age in token_ages(sample.generation, trained_version)
    ]
    tokens = sum(count for _, count in ages)
    return {
        "staleness_mean": sum(age * count for age, count in ages) / max(1, tokens),
        "staleness_max": float(max((age for age, count in ages if count), default=0)),
    }

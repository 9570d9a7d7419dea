"""How old the weights were that sampled a batch, in steps."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_laser.types import Generation, Group, WeightSpan


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

"""What a plan cannot know: how long prompts and responses are, what a cache saves, how long grading takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.errors import ConfigError

_MEAN_SHARE = 0.35
_PROMPT_TOKENS = 160.0
_POINTS = 128  # quantiles that stand for a distribution


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What responses, prompts and graders are like.

    prompt_tokens: mean of a prompt. common_tokens: that all prompts begin with. response_tokens, response_spread:
    responses have a lognormal length of this mean and this standard deviation of its logarithm, and are cut at
    `rollout.max_new_tokens`. responses: lengths that were measured, which take their place; () for none.

    prefix_cached: share of a group's further prompts that a server has in its cache. grading_seconds: of one response
    in one worker. imbalance: by how much the busiest data-parallel rank computes longer than the mean. memory_fraction:
    of a GPU that generates, for weights and cache. sources: where each is from, by field.
    """

    prompt_tokens: float = _PROMPT_TOKENS
    response_tokens: float = 2048.0
    response_spread: float = 0.6
    prefix_cached: float = 0.95
    grading_seconds: float = 0.01
    imbalance: float = 0.03
    memory_fraction: float = 0.85
    common_tokens: float = 0.0
    responses: tuple[int, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_lengths(
        cls, prompt_lengths: Sequence[int], response_lengths: Sequence[int], base: Assumptions | None = None
    ) -> Assumptions:
        """`base` with the lengths of a batch, in tokens. Raises ValueError where there are none."""
        if not len(prompt_lengths) or not len(response_lengths):
            raise ValueError("no lengths to reckon with")
        base = cls() if base is None else base
        responses = tuple(sorted(int(length) for length in response_lengths))
        if (
            len(responses) > _POINTS
        ):  # quantiles, at the middle of equal shares; the mean moves by far less than 1 %
            places = ((point + 0.5) / _POINTS * len(responses) for point in range(_POINTS))
            responses = tuple(responses[int(place)] for place in places)
        return replace(
            base,
            prompt_tokens=sum(map(int, prompt_lengths)) / len(prompt_lengths),
            response_tokens=sum(map(int, response_lengths)) / len(response_lengths),
            responses=responses,
            sources=dict({**base.sources, "prompt_tokens": "measured", "response_tokens": "measured"}),
        )

    def lengths(self, limit: int) -> tuple[int, ...]:
        """Tokens of responses that stand for all of them, each for as many, ascending; none longer than `limit`."""
        if self.responses:
            return tuple(min(limit, max(1, length)) for length in self.responses)
        if self.response_spread == 0.0:
            return (min(limit, max(1, round(self.response_tokens))),)
        centre = math.log(self.response_tokens) - self.response_spread**2 / 2
        normal = NormalDist(centre, self.response_spread)
        return tuple(
            min(limit, max(1, round(math.exp(normal.inv_cdf((point + 0.5) / _POINTS)))))
            for point in range(_POINTS)
        )

    def lines(self) -> list[str]:
        """`name: value (source)` of each, as one would write it."""
        found = []
        for one in fields(self):
            if one.name in ("sources", "responses"):
                continue
            source = self.sources.get(one.name, "assumed")
            found.append(f"{one.name}: {getattr(self, one.name):.4g} ({source})")
        if self.responses:
            found.append(
                f"responses: {len(self.responses)} lengths, {self.responses[0]:,} to {self.responses[-1]:,}"
            )
        return found


_SOURCES = {
    "prompt_tokens": "assumed: a competition problem with its instruction; at most half of data.max_prompt_tokens",
    "response_tokens": f"assumed: {_MEAN_SHARE:.0%} of rollout.max_new_tokens",
    "response_spread": "assumed: one response in twenty is more than twice as long as the mean",
    "prefix_cached": "assumed: samples of one prompt go to one server",
    "grading_seconds": "assumed: an answer that is compared by rules",
    "imbalance": "assumed: what sharing out by length leaves",
    "memory_fraction": "what SGLang takes where its options do not say",
    "common_tokens": "assumed: problems without an instruction before them",
}


def read_assumptions(config: RunConfig, file: Path | None = None) -> Assumptions:
    """Those of a run; a YAML file with some of `Assumptions`' fields overrides them.

    Raises:
        ConfigError: the file cannot be read, or has fields that are unknown or impossible.
    """
    start = Assumptions(
        prompt_tokens=min(_PROMPT_TOKENS, config.data.max_prompt_tokens / 2),
        response_tokens=max(1.0, _MEAN_SHARE * config.rollout.max_new_tokens),
        sources=dict(_SOURCES),
    )
    if file is None:
        return start
    if not file.is_file():
        raise ConfigError(["no such file; expected a YAML file with some assumptions"], str(file))
    problems: list[str] = []
    given: dict[str, Any] = {}
    known = {one.name for one in fields(Assumptions)} - {"sources"}
    for name, value in read_yaml(file).data.items():
        if name not in known:
            problems.append(f"{name}: no such assumption; there are {', '.join(sorted(known))}")
        elif name == "responses":
            given[name] = _responses(value, problems)
        else:
            given[name] = _checked(name, value, problems)
    if problems:
        raise ConfigError(problems, str(file))
    if given.get("responses"):
        given["response_tokens"] = sum(given["responses"]) / len(given["responses"])
    sources = {**start.sources, **dict.fromkeys(given, Path(file).name)}
    return replace(start, **given, sources=dict(sources))


_BOUNDS = {
    "prompt_tokens": (1.0, math.inf),
    "response_tokens": (1.0, math.inf),
    "response_spread": (0.0, 3.0),
    "prefix_cached": (0.0, 1.0),
    "grading_seconds": (0.0, math.inf),
    "imbalance": (0.0, 10.0),
    "memory_fraction": (0.05, 1.0),
    "common_tokens": (0.0, math.inf),
}


def _checked(name: str, value: Any, problems: list[str]) -> float:
    least, most = _BOUNDS[name]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        limit = "" if most == math.inf else f" to {most:g}"
        problems.append(f"{name}: {value!r}, expected a number, {least:g}{limit or ' or more'}")
    return number


def _responses(value: Any, problems: list[str]) -> tuple[int, ...]:
    fits = isinstance(value, list) and value and all(type(one) is int and one > 0 for one in value)
    if not fits:
        problems.append("responses: expected a list of lengths in tokens, 1 or more each")
        return ()
    return tuple(sorted(value))

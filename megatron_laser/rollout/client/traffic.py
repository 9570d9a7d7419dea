"""What a driver counts, and which weights its answers must come from."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Traffic:
    """Counts since they were last taken; seconds are summed over requests."""

    requests: int = 0
    retries: int = 0
    stale_replies: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generate_seconds: float = 0.0
    scores: int = 0
    score_tokens: int = 0
    score_cached_tokens: int = 0
    score_seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """As metrics.jsonl names them."""
        found = {
            "rollout/requests": float(self.requests),
            "rollout/retries": float(self.retries),
            "rollout/stale_replies": float(self.stale_replies),
            "rollout/prefix_cached_fraction": self.cached_tokens / max(1, self.prompt_tokens),
        }
        if self.scores:
            found["rollout/score_cached_fraction"] = self.score_cached_tokens / max(1, self.score_tokens)
            found["rollout/score_uncached_tokens"] = (
                self.score_tokens - self.score_cached_tokens
            ) / self.scores
            found["rollout/score_time_fraction"] = self.score_seconds / max(
                1e-9, self.score_seconds + self.generate_seconds
            )
        return found

    def take(self) -> dict[str, float]:
        """The metrics; counting starts anew."""
        found = self.metrics()
        for each in fields(self):
            setattr(self, each.name, type(getattr(self, each.name))())
        return found


@dataclass(frozen=True)
class Weights:
    """The weights that answers must come from: the servers' name for them, and the step."""

    label: str | None
    version: int

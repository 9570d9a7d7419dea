"""Prompts of several sources in fixed shares: one cursor for each, and whose turn it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_laser.data.cursor import PromptCursor
from megatron_laser.errors import DataError


@dataclass(frozen=True, slots=True)
class MixedSource:
    """A source's name, its share of the prompts, and the cursor over its prompts."""

    name: str
    share: Fraction
    cursor: PromptCursor


class MixedCursor:
    """An endless walk over the prompts of several sources, which stand one source behind the other.

    After n prompts a source with the share w has given more than n * w - 1 and fewer than n * w + 1 of them, for
    every n. Whose turn it is follows from how many each has given, so that the cursors' states are the state.
    """

    def __init__(self, sources: Sequence[MixedSource]) -> None:
        """Start before the first prompt.

        Args:
            sources: two or more; shares above 0 that add up to 1, each name once.

        Raises:
            ValueError: they do not.
        """
        if len(sources) < 2 or min(s.share for s in sources) <= 0 or sum(s.share for s in sources) != 1:
            raise ValueError("a mixture has two sources or more, whose shares are above 0 and add up to 1")
        if len({source.name for source in sources}) < len(sources):
            raise ValueError("each source of a mixture has a name of its own")
        self._sources = tuple(sources)
        self._starts = [sum(s.cursor.num_prompts for s in sources[:place]) for place in range(len(sources))]
        whole = math.lcm(*(source.share.denominator for source in sources))
        self._weights = [int(source.share * whole) for source in sources]  # integers: nothing is rounded

    @property
    def progress(self) -> float:
        """Prompts handed out over the number that there are."""
        return self._taken() / sum(source.cursor.num_prompts for source in self._sources)

    def progress_by_source(self) -> dict[str, float]:
        """Each source's own epochs."""
        return {source.name: source.cursor.progress for source in self._sources}

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` prompts as (position among all sources' prompts, epoch of their source)."""
        if count < 0:
            raise ValueError(f"cannot take {count} prompts")
        taken: list[tuple[int, int]] = []
        for _ in range(count):
            place = self._next()
            ((position, epoch),) = self._sources[place].cursor.take(1)
            taken.append((self._starts[place] + position, epoch))
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where every source's cursor stands; plain JSON values."""
        return {
            "sources": [
                {"name": source.name, "share": str(source.share), "cursor": source.cursor.state_dict()}
                for source in self._sources
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; the next `take` gives what it would have given there.

        Raises:
            DataError: the state is of one source, of other sources or shares, or does not fit one of them. The cursors
                are unchanged then.
        """
        if "sources" not in state:
            raise DataError(
                "the saved data cursor is over one source, and data.train has several now: resume with the same "
                "data.train, or start a new run"
            )
        saved = {entry["name"]: Fraction(entry["share"]) for entry in state["sources"]}
        now = {source.name: source.share for source in self._sources}
        if list(saved.items()) != list(now.items()):
            raise DataError(
                f"the saved data cursor belongs to another mixture: saved {_shares(saved)}, now {_shares(now)}; resume "
                "with the same data.train, or start a new run"
            )
        for source, entry in zip(self._sources, state["sources"], strict=True):
            try:
                source.cursor.check_state(entry["cursor"])
            except DataError as error:
                raise DataError(f"source {source.name!r}: {error}") from error
        for source, entry in zip(self._sources, state["sources"], strict=True):
            source.cursor.load_state_dict(entry["cursor"])

    def _taken(self) -> int:
        return sum(source.cursor.taken for source in self._sources)

    def _next(self) -> int:
        """The source of the next prompt, by R. Tijdeman's rule (The chairman assignment problem, 1980).

        Among the sources that may go next without getting too far ahead, the one that would soonest be too far behind;
        of equals the first. It keeps every source within 1 - 1 / (2k - 2) of its share for k sources.
        """
        number, whole = self._taken() + 1, sum(self._weights)
        slack = 2 * len(self._sources) - 2
        best, latest = -1, Fraction(0)
        for place, (weight, source) in enumerate(zip(self._weights, self._sources)):
            due = slack * (
                weight * number - whole * source.cursor.taken
            )  # in units of 1 / (slack * whole) prompts
            if due < whole:
                continue
            late = Fraction((slack - 1) * whole - due, weight)
            if best < 0 or late < latest:
                best, latest = place, late
        return best


def _shares(shares: dict[str, Fraction]) -> str:
    return ", ".join(f"{name} {float(share):.4g}" for name, share in shares.items())

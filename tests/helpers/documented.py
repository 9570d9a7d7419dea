"""docs/metrics.md as patterns: which names of metrics it explains."""

from __future__ import annotations

import re
from collections.abc import Iterable

from helpers.source_tree import ROOT

TEXT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


TRAINING, _, EVALUATIONS = TEXT.partition("\n## Evaluations")


def names(part: str = TEXT) -> list[str]:
    """The names in the first columns of the tables of a part of the page."""
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def patterns(part: str = TEXT) -> dict[str, str]:
    """Each name of a part of the page, and what it matches."""
    return {name: _pattern(name) for name in names(part)}


def undocumented(keys: Iterable[str]) -> list[str]:
    """Those of `keys`, of a metrics.jsonl, that the page does not explain."""
    training, evaluation = patterns(TRAINING).values(), patterns(EVALUATIONS).values()

    def known(key: str) -> bool:
        split = re.match(r"(?:eval|test)/(.+)", key)
        name = split[1] if split else key
        if of_source := re.match(r"source/[^/]+/(.+)", name):
            name = of_source[1]
        return any(re.fullmatch(pattern, name) for pattern in (evaluation if split else training))

    return sorted(key for key in set(keys) if not known(key))


_WAYS = "average|pass|majority|weighted_majority|best_of|logprob_majority|best_by_logprob"
_VERIFICATION = "f1|accuracy|accuracy_correct|accuracy_incorrect|auroc|ece|brier"
_PARTS = {"way": _WAYS, "k": r"\d+", "verification": _VERIFICATION, "metric": ".+", "quarter": "[1-4]"}


def _pattern(name: str) -> str:
    pieces = re.split(r"<(\w+)>", name)
    return "".join(
        re.escape(piece) if index % 2 == 0 else f"(?:{_PARTS.get(piece, '[^/]+')})"
        for index, piece in enumerate(pieces)
    )

"""Further readouts among a step's metrics, `readout/<name>/...`: their names, and what a person looks at first."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A name may have slashes of its own, what is measured has none.
_METRIC = re.compile(r"readout/(.+)/[^/]+")


def readout_names(metrics: Iterable[str]) -> list[str]:
    """Of the readouts that have a metric, in the order in which they come; the response's score is none of them."""
    return list(dict.fromkeys(found[1] for name in metrics if (found := _METRIC.fullmatch(name))))


def readout_fields(metrics: Iterable[str]) -> list[tuple[str, str, str]]:
    """(label, metric, format) of each readout's AUROC and loss."""
    return [
        (f"{name} {label}", f"readout/{name}/{metric}", form)
        for name in readout_names(metrics)
        for label, metric, form in (("AUROC", "auroc", ".3f"), ("loss", "loss", ".4f"))
    ]

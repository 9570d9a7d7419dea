"""The part of an evaluation's report that is about scores of prefixes: tables, a figure, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.report.plots.prefixes import plot_prefixes
from megatron_laser.report.plots.style import styled

_WAYS = {"accuracy": "accuracy", "majority": "majority", "weighted_majority": "weighted"}


def prefix_section(name: str, detail: Mapping[str, Any], output: Path) -> list[str]:
    """Blocks of Markdown; the figure goes to `output`/plots.

    Args:
        detail: a benchmark's part of results.json, with `prefix` in it.
    """
    prefix = detail["prefix"]
    blocks = ["### Scores while generating\n", _setting(prefix)]
    if "ended" in prefix:
        return [*blocks, _ended(prefix)]
    with styled():
        drawn = plot_prefixes(name, prefix, output / "plots" / f"{name}_prefixes.png")
    if drawn is not None:
        blocks.append(f"![{drawn.stem}](plots/{drawn.name})\n")
    k = len(detail["curves"]["average"]["mean"])
    return [*blocks, _positions(prefix), _stop_below(prefix["stop_below"], k)]


def place_name(row: Mapping[str, Any]) -> str:
    """Of a row's places: `5`, or `5–20` of several."""
    return str(row["first"]) + ("" if row["first"] == row["last"] else f"–{row['last']}")


def _setting(prefix: Mapping[str, Any]) -> str:
    rule = prefix["rule"]
    where = (
        f"each occurrence of {rule['delimiter']!r}"
        if "delimiter" in rule
        else f"every {rule['every']} tokens"
    )
    which = f"the run's readout `{prefix['name']}`" if prefix["name"] else "the score of the end"
    if rule["kind"] == "scaled_logratio":
        constants = f", beta {rule['beta']:g}, ref_logprob {rule['ref_logprob']:g}"
    else:
        constants = f", {rule['kind']}"
    return (
        f"Prefixes are scored behind {where} (not behind a response's last token), by {which}: token "
        f"{', '.join(map(str, rule['token_ids']))}{constants}.\n"
    )


def _positions(prefix: Mapping[str, Any]) -> str:
    what = "occurrence" if "delimiter" in prefix["rule"] else "behind token"
    rows = [(place_name(row), row) for row in prefix["by_position"]]
    rows.append(("end", {**prefix["end"], "end_auroc": None}))
    lines = [
        f"| {what} | mean tokens | responses that go on | right | mean score of right | of wrong | AUROC "
        "| of the end's score, same responses |",
        "|---|" + "---:|" * 7,
    ]
    for place, row in rows:
        cells = [
            "–" if row["tokens"] is None else f"{row['tokens']:.0f}",
            str(row["responses"]),
            *(_number(row[key]) for key in ("right", "score_right_mean", "score_wrong_mean")),
            f"{_number(row['auroc'])} {_interval(row)}".strip(),
            _number(row["end_auroc"]),
        ]
        lines.append(f"| {place} | " + " | ".join(cells) + " |")
    note = (
        "The row of the end is of responses that have a score there. AUROC: the chance that a prefix of a response "
        "that will be right has the higher score; the responses that go on to a later place are others than those of "
        "an earlier one, which the last column shows."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def _stop_below(rows: Sequence[Mapping[str, Any]], k: int) -> str:
    ways = [way for way in _WAYS if way in rows[0]]
    titles = [_WAYS[way] + ("" if way == "accuracy" else f"@{k}") for way in ways]
    lines = [
        "What ending a response at the first prefix with a score below a threshold would have done, computed from "
        "these whole responses (`--end-early` really ends them). An ended one counts as wrong and has no vote; behind "
        "a value its change by ending, with a 95 % bootstrap interval over problems.\n",
        "| ended below | responses ended | right ones ended | tokens saved | " + " | ".join(titles) + " |",
        "|---|" + "---:|" * (3 + len(ways)),
    ]
    for row in rows:
        threshold = "never" if row["threshold"] is None else f"{row['threshold']:g}"
        cells = [_percent(row[key]) for key in ("ended", "right_ended", "tokens_saved")]
        for way in ways:
            value = row[way]
            change = f" {value['change']:+.3f} {_interval(value)}" if row["threshold"] is not None else ""
            cells.append(_number(value["value"]) + change)
        lines.append(f"| {threshold} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ended(prefix: Mapping[str, Any]) -> str:
    ended = prefix["ended"]
    tokens = ended["tokens"]
    lines = [
        f"Generation was ended at the first prefix with a score below {ended['threshold']:g}: {ended['ended']} of "
        f"{ended['responses']} responses. {tokens} tokens were generated, {tokens / ended['responses']:.1f} for a "
        f"response, {ended['tokens_of_ended']} of them in responses that were ended. Those count as wrong everywhere "
        "in this report, have no vote, and are not graded. How well scores of prefixes tell right from wrong, and what "
        "other thresholds would do, an evaluation of whole responses says (without `--end-early`).\n",
        "| "
        + ("occurrence" if "delimiter" in prefix["rule"] else "behind token")
        + " | scored there | ended |",
        "|---|---:|---:|",
    ]
    lines += [f"| {place_name(row)} | {row['responses']} | {row['ended']} |" for row in ended["by_position"]]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["low"], row["high"]
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"

"""What was found, as a person reads it: by group, one line a topic, then examples and what to do; or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import typer

from megatron_laser.errors import Finding, Level
from megatron_laser.run.preflight.ledger import Ledger

_COLOURS: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}
_LEVEL = 9  # columns
_LEAST = 60


def lines(ledger: Ledger, order: Sequence[str], width: int) -> Iterator[str]:
    """The report, wrapped at `width` columns; words are never cut.

    Args:
        order: of the groups; those that it does not name come last.
    """
    names = [*(name for name in order if name in ledger.groups), *(set(ledger.groups) - set(order))]
    width = max(width, _LEAST)
    column = max((len(finding.topic) for finding in ledger.findings), default=0) + 2
    for name in names:
        yield typer.style(name, bold=True)
        for finding in ledger.groups[name]:
            yield from _finding(finding, column, width)
        yield ""
    yield summary(ledger)


def summary(ledger: Ledger) -> str:
    """The last line: how many of each, and what that means."""
    counts = {level: sum(one.level == level for one in ledger.findings) for level in _COLOURS}
    if counts["error"]:
        return f"{_count(counts['error'], 'error')}, {_count(counts['warning'], 'warning')}: the run would not start"
    if counts["warning"]:
        return f"no error, {_count(counts['warning'], 'warning')}: the run starts, perhaps not as meant"
    return "no error and no warning"


def as_json(ledger: Ledger) -> str:
    """{"findings": [...], "errors": n, "warnings": n}; a finding has its group, topic, level, text, examples, cure."""
    found = [{"group": name, **asdict(one)} for name, group in ledger.groups.items() for one in group]
    return json.dumps(
        {
            "findings": found,
            "errors": sum(one["level"] == "error" for one in found),
            "warnings": sum(one["level"] == "warning" for one in found),
        },
        indent=1,
        ensure_ascii=False,
    )


def _finding(finding: Finding, column: int, width: int) -> Iterator[str]:
    level = typer.style(f"{finding.level:<{_LEVEL}}", fg=_COLOURS[finding.level])
    head = f"  {finding.level:<{_LEVEL}}{finding.topic:<{column}}"
    hang = " " * len(head)
    first, *rest = _wrap(f"{head}{finding.text}", hang, width)
    yield first.replace(f"{finding.level:<{_LEVEL}}", level, 1)
    yield from rest
    for example in finding.examples:
        yield from _wrap(f"{hang}- {example}", f"{hang}  ", width)
    if finding.cure:
        yield from _wrap(f"{hang}-> {finding.cure}", f"{hang}   ", width)


def _wrap(text: str, hang: str, width: int) -> list[str]:
    text = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [text]


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")

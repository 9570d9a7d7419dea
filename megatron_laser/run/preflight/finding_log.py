"""The findings of a preflight, in order, as a person reads them or as JSON.

An error ends everything at once (a run's start) or only what needs it (`check`).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import typer

from megatron_laser.errors import ConfigError, Finding, Level, UserError

_COLOURS: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}
_LEVEL = 9  # columns
_LEAST = 60

T = TypeVar("T")
_SKIPPED = "not looked at: it needs"


class CheckFailed(UserError, ValueError):
    """Something that was looked at is so wrong that the run must not start."""


class Skipped(Exception):
    """Raised inside a topic that needs something which an earlier topic did not find."""


@dataclass
class FindingLog:
    """Takes in findings, group by group.

    Attributes:
        stop_at_errors: raise at the first error, as a run does at its start; False: note it and go on.
        on_finding: told of each finding as it comes.
        groups: findings by the name of their group, in order.
    """

    stop_at_errors: bool = True
    on_finding: Callable[[Finding], None] = lambda finding: None
    groups: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, group: str, findings: Iterable[Finding]) -> None:
        """Take in `findings`.

        Raises:
            CheckFailed: with all errors among them, where errors stop.
        """
        findings = list(findings)
        self.groups.setdefault(group, []).extend(findings)
        for finding in findings:
            self.on_finding(finding)
        errors = [finding for finding in findings if finding.level == "error"]
        if errors and self.stop_at_errors:
            raise CheckFailed("\n".join(one_line(finding) for finding in errors))

    @contextmanager
    def topic(self, group: str, name: str) -> Iterator[None]:
        """Look at one thing: an error that the user can put right is a finding where errors do not stop.

        What is skipped is said once, and not where the topic has an error already.
        """
        try:
            yield
        except Skipped as missing:
            said = [one for one in self.findings if one.topic == name]
            if not any(one.level == "error" or one.text.startswith(_SKIPPED) for one in said):
                self.add(group, [Finding(name, "note", f"{_SKIPPED} {missing}")])
        except (UserError, OSError) as error:
            if self.stop_at_errors:
                raise
            self.add(group, [Finding(name, "error", _text(error))])

    @property
    def findings(self) -> list[Finding]:
        """All of them, in order."""
        return [finding for group in self.groups.values() for finding in group]


def needed(value: T | None, name: str) -> T:
    """`value`; raises Skipped where an earlier topic did not find it."""
    if value is None:
        raise Skipped(name)
    return value


def one_line(finding: Finding) -> str:
    """For a log, or an error's message, with the topic."""
    return f"{finding.topic}: {finding.line}"


def _text(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return "; ".join(([error.source] if error.source else []) + list(error.problems))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def lines(log: FindingLog, order: Sequence[str], width: int) -> Iterator[str]:
    """The report, wrapped at `width` columns; words are never cut.

    Args:
        order: of the groups; those that it does not name come last.
    """
    names = [*(name for name in order if name in log.groups), *(set(log.groups) - set(order))]
    width = max(width, _LEAST)
    column = max((len(finding.topic) for finding in log.findings), default=0) + 2
    for name in names:
        yield typer.style(name, bold=True)
        for finding in log.groups[name]:
            yield from _finding(finding, column, width)
        yield ""
    yield summary(log)


def summary(log: FindingLog) -> str:
    """The last line: how many of each, and what that means."""
    counts = {level: sum(one.level == level for one in log.findings) for level in _COLOURS}
    if counts["error"]:
        return f"{_count(counts['error'], 'error')}, {_count(counts['warning'], 'warning')}: the run would not start"
    if counts["warning"]:
        return f"no error, {_count(counts['warning'], 'warning')}: the run starts, perhaps not as meant"
    return "no error and no warning"


def as_json(log: FindingLog) -> str:
    """{"findings": [...], "errors": n, "warnings": n}; a finding has its group, topic, level, text, examples, cure."""
    found = [{"group": name, **asdict(one)} for name, group in log.groups.items() for one in group]
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

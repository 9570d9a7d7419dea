"""What was found, in order; an error ends everything at once (a run's start) or only what needs it (`check`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_laser.errors import ConfigError, Finding, UserError

T = TypeVar("T")
_SKIPPED = "not looked at: it needs"


class CheckFailed(UserError, ValueError):
    """Something that was looked at is so wrong that the run must not start."""


class Skipped(Exception):
    """Raised inside a topic that needs something which an earlier topic did not find."""


@dataclass
class Ledger:
    """Takes in findings, group by group.

    Attributes:
        stop_at_errors: raise at the first error, as a run does at its start; False: note it and go on.
        hear: told of each finding as it comes.
        groups: findings by the name of their group, in order.
    """

    stop_at_errors: bool = True
    hear: Callable[[Finding], None] = lambda finding: None
    groups: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, group: str, findings: Iterable[Finding]) -> None:
        """Take in `findings`.

        Raises:
            CheckFailed: with all errors among them, where errors stop.
        """
        findings = list(findings)
        self.groups.setdefault(group, []).extend(findings)
        for finding in findings:
            self.hear(finding)
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

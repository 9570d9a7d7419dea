"""Names of the weight groups that servers still hold, in a file that outlives the trainer.

Servers keep their side of a group until somebody names it: after a trainer was killed, long-lived servers would hold
one communicator's buffers more for every resume.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megatron_laser.rollout.endpoints import write_private

logger = logging.getLogger(__name__)


class PastGroups:
    """What `file` knows; None: nothing is remembered, since the servers end with the run."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._names: list[str] = []
        if file is not None and file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                self._names = [name for name in found if isinstance(name, str)]
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s cannot be read, weight groups of an earlier run stay: %s", file, error)

    def of_other_sessions(self, session: str) -> list[str]:
        """Names of groups that no transport of `session` has made."""
        return [name for name in self._names if not name.startswith(f"laser-{session}-")]

    def add(self, name: str) -> None:
        """Before servers join it."""
        self._write([*self._names, name])

    def remove(self, names: list[str]) -> None:
        """Servers have been told to leave these."""
        self._write([name for name in self._names if name not in names])

    def _write(self, names: list[str]) -> None:
        if names == self._names:
            return
        self._names = names
        if self._file is None:
            return
        try:
            write_private(self._file, json.dumps(names) + "\n")
        except OSError as error:  # only a later run's tidying depends on it
            logger.warning("%s cannot be written, weight groups will outlive this run: %s", self._file, error)
            self._file = None

"""The errors that configuration and its model folder raise."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_laser.errors import UserError


class ConfigError(UserError, ValueError):
    """One or more problems of a run configuration, reported together.

    Attributes:
        problems: one line each; names the setting, its value, what was expected and what to do.
        source: the file (or folder) at fault, "" when there is none.
    """

    def __init__(self, problems: Sequence[str], source: str = "") -> None:
        if not problems:
            raise ValueError("a ConfigError needs at least one problem")
        self.problems = tuple(problems)
        self.source = source
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        head = f"{source}: {count} in the configuration" if source else f"{count} in the configuration"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))


class ModelFolderError(UserError, ValueError):
    """A model folder whose files cannot be trained or run as they are; one line that names file or tensor."""

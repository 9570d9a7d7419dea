"""Whole runs end with a report, whose figures take longer than the run: they are composed, and not painted.

A module of tests that looks at figures says `PAINTED = True`; other processes than this one and helpers/ranks.py's
paint as always.
"""

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

#: A white pixel.
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
)


@contextlib.contextmanager
def unpainted() -> Iterator[None]:
    """In here a figure is saved as one pixel."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, path: str | Path, **settings: Any) -> None:
        Path(path).write_bytes(_PNG)

    with mock.patch.object(Figure, "savefig", savefig):
        yield

"""What `pytest -n 2` runs side by side: files, but the tests of the one shared SGLang server in one worker."""

from collections.abc import Sequence
from typing import Any

import pytest

SHARED_SERVER = "tests/servers/"
# What takes long begins early, so that the workers end at about the same time.
_FIRST = ("tests/long/", "tests/distributed/", "tests/te/", SHARED_SERVER)


def scheduling(config: pytest.Config, log: Any) -> Any:
    """A scheduler of pytest-xdist that gives whole files to workers, in the order of collection."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class FilesSideBySide(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SHARED_SERVER if nodeid.startswith(SHARED_SERVER) else nodeid.split("::", 1)[0]

    config.option.loadscopereorder = False
    return FilesSideBySide(config, log)


def long_ones_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests, files kept together.

    Raises pytest.UsageError for a test that uses the fixture `sglang_server` in another folder: its worker would
    start a second server.
    """
    strays = [
        item.nodeid
        for item in items
        if "sglang_server" in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(SHARED_SERVER)
    ]
    if strays:
        raise pytest.UsageError(
            f"these tests use the shared SGLang server; move them to {SHARED_SERVER}: {strays}"
        )
    return sorted(items, key=_place)


def _place(item: pytest.Item) -> int:
    return next((place for place, folder in enumerate(_FIRST) if item.nodeid.startswith(folder)), len(_FIRST))

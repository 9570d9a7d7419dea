"""The source of the user's reward code as it was when the run started.

A worker that is started later (its predecessor hung or died) must grade as the first one did, whatever was edited
since. So each worker tells the pool what user code it has read, and the pool hands that to the workers after it.
Code of installed packages is not kept.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import TypedDict

from megatron_laser.rewards.workers.user_code import is_users_code


class Source(TypedDict):
    """One file as it was read: `text` holds its bytes, as Latin-1, so that JSON can carry any."""

    path: str
    text: str


Sources = dict[str, Source]
"""By module name."""


class SourceKeeper:
    """In a worker: user modules are run from the given sources, and what is read besides is noted."""

    def __init__(self, given: Sources) -> None:
        self._known = dict(given)
        self._new: Sources = {}

    def install(self) -> None:
        """From now on every import of user code goes through here."""
        keeper = self
        original = SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
            if not is_users_code(loader.path):
                return original(loader, name)
            return loader.source_to_code(keeper._read(name, loader.path), loader.path)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
        sys.meta_path.insert(0, _KeptFinder(self._known))

    def take_new(self) -> Sources:
        """What was read since the last call."""
        new, self._new = self._new, {}
        return new

    def _read(self, name: str, path: str) -> bytes:
        source = self._known.get(name)
        if source is None or source["path"] != os.path.abspath(path):
            with open(path, "rb") as file:
                text = file.read().decode("latin-1")
            source = self._known[name] = self._new[name] = Source(path=os.path.abspath(path), text=text)
        return source["text"].encode("latin-1")


class _KeptFinder(importlib.abc.MetaPathFinder):
    """Finds a known module where it was found first, even if its file is gone."""

    def __init__(self, known: Sources) -> None:
        self._known = known

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self._known.get(fullname)
        if source is None:
            return None
        file = source["path"]
        folder = [os.path.dirname(file)] if os.path.basename(file) == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=SourceFileLoader(fullname, file), submodule_search_locations=folder
        )


class SourceSnapshot:
    """In the pool: the sources that workers have reported, the first report of each; notices edits. Thread-safe."""

    def __init__(self) -> None:
        self._sources: Sources = {}
        self._seen: dict[str, tuple[int, int] | None] = {}  # path -> size and time at the last look
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def add(self, sources: Sources) -> None:
        """Keep what is not known yet."""
        with self._lock:
            for name, source in sources.items():
                self._sources.setdefault(name, source)

    def sources(self) -> Sources:
        """All that is known, for a new worker."""
        with self._lock:
            return dict(self._sources)

    def fingerprints(self) -> dict[str, str]:
        """Path to a hash of the source, for comparing with another run of the same code."""
        return {source["path"]: _hash(source) for source in self.sources().values()}

    def newly_edited(self) -> list[str]:
        """Files that are not any more what the workers run; each is named once."""
        edited = []
        for source in self.sources().values():
            path = source["path"]
            state = _state(path)
            with self._lock:
                if path in self._said or (path in self._seen and self._seen[path] == state):
                    continue
                self._seen[path] = state
                if not _is_as_kept(source):
                    self._said.add(path)
                    edited.append(path)
        return edited


def _hash(source: Source) -> str:
    return hashlib.sha256(source["text"].encode("latin-1")).hexdigest()[:16]


def _state(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _is_as_kept(source: Source) -> bool:
    try:
        with open(source["path"], "rb") as file:
            return file.read() == source["text"].encode("latin-1")
    except OSError:
        return False

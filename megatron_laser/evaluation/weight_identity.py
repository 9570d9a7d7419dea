"""Which weights are these? By content: of the files in a model folder, and of what an engine holds.

Names, sizes and times do not tell one training step's weights from another's: an export replaces a file by one of
the same name and size, a link is moved, a server is sent new weights under its old name. All bytes are read: blocks
sampled from a file would miss a change between them. What that takes is paid once for a file: its digest is kept by
inode, size and nanosecond times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_laser.errors import UserError
from megatron_laser.files import write_atomically
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerError, ServerGone, ServerMismatch
from megatron_laser.rollout.sglang_api import CHECKSUM_BODY, WEIGHTS_CHECKER
from megatron_laser.weight_sync.checksums import fingerprint, no_checksums

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
# What decides, beside the weights, which text comes of token ids and which ids of text.
_SMALL = (
    *("config.json", "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.tiktoken"),
)
_BLOCK = 16 * 2**20  # bytes that one thread hashes at a time
_MOST_THREADS = 16
_SETTLED = 2.0  # seconds: a file that changed less long ago may change again without a new time
_CHECKSUM_SECONDS = 300.0


class WeightsChanged(UserError, RuntimeError):
    """Weights that were used for minutes are no longer those that they were at the beginning."""


class FolderWeights:
    """The weight files of a model folder, open, so that they stay the same files when others take their names.

    Attributes:
        identity: "sha256:HEX" of names and bytes; None: not asked for.
    """

    def __init__(self, folder: Path, *, cache: Path | None = None, identify: bool = True) -> None:
        """Read all of it, but for the files whose digests are in `cache` (a JSON file, which is written).

        Args:
            identify: False: read nothing; a change is then seen by times alone.

        Raises:
            WeightsChanged: a file is written to at the moment.
            FileNotFoundError: there is none.
        """
        self._folder = folder
        self._files: dict[Path, int] = {}
        try:
            for path in _matching(folder, _WEIGHTS):
                self._files[path] = os.open(path, os.O_RDONLY)
            if not self._files:
                raise FileNotFoundError(f"{folder}: no weight file ({', '.join(_WEIGHTS)}) is there")
            self._states = {path: _state(number) for path, number in self._files.items()}
            self.identity = self._digest(cache) if identify else None
        except BaseException:
            self.close()
            raise

    def changed(self) -> bool:
        """Whether somebody seems to have written into the files; asks for their times alone."""
        try:
            return any(_state(number)[1:3] != self._states[path][1:3] for path, number in self._files.items())
        except OSError:  # a network file system that forgets files when another machine replaces them
            return True

    def check(self) -> None:
        """Raises WeightsChanged when somebody has written into the files."""
        if not self.changed():
            return
        if self.identity is None or self._digest(None) != self.identity:
            raise WeightsChanged(f"{self._folder}: its weights were overwritten while they were in use")
        self._states = {path: _state(number) for path, number in self._files.items()}  # touched, no more

    def check_loaded(self) -> None:
        """Call when something has loaded the folder: did it see these files?

        Raises WeightsChanged when it may have seen others.
        """
        if self.changed() or self.replaced():
            raise WeightsChanged(
                f"{self._folder}: its weights were replaced while they were loaded; run the same command again"
            )

    def replaced(self) -> bool:
        """Whether other files have their names by now."""
        found = set(_matching(self._folder, _WEIGHTS))
        return found != set(self._files) or any(
            os.stat(path).st_ino != os.fstat(number).st_ino for path, number in self._files.items()
        )

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for number in self._files.values():
            os.close(number)
        self._files = {}

    def _digest(self, cache: Path | None) -> str:
        known = _read_cache(cache)
        digests: dict[Path, str] = {}
        started, read = time.monotonic(), 0
        with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as threads:
            for path, number in self._files.items():
                state = _state(number)
                entry = known.get(state[0])
                if entry is not None and entry[:3] == list(state[1:]):
                    digests[path] = entry[3]
                    continue
                read += state[1]
                digests[path] = _file_digest(number, state[1], threads)
                if _state(number) != state:
                    raise WeightsChanged(f"{path} is being written; wait until it is complete")
                known.pop(state[0], None)
                if time.time() - max(state[2], state[3]) / 1e9 > _SETTLED:
                    known[state[0]] = [*state[1:], digests[path]]
        if read:
            logger.info(
                "%s: read %.2f GiB in %.1f s to tell its weights from others",
                self._folder,
                read / 2**30,
                time.monotonic() - started,
            )
            if cache is not None:
                write_atomically(cache, json.dumps(known) + "\n")
        total = hashlib.sha256()
        for path, digest in sorted(digests.items()):
            total.update(f"{path.name} {digest}\n".encode())
        return f"sha256:{total.hexdigest()}"


def small_files_digest(folder: Path) -> str:
    """ "sha256:HEX" of a model folder's configuration and tokenizer files: names and bytes."""
    return files_digest(_matching(folder, _SMALL))


def files_digest(files: Sequence[Path]) -> str:
    """ "sha256:HEX" of small files: names and bytes, in the order given."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def engine_digest(engine: Any) -> str | None:
    """The digest of the weights that an engine holds, by content; None: it does not tell.

    In this process the parameters are read; servers are asked for their checksums.

    Raises:
        ServerMismatch: servers hold different weights.
        ServerError: one does not answer.
    """
    if isinstance(engine, SglangEngine):
        return _servers_digest(engine)
    own: Callable[[], Mapping[str, torch.Tensor]] | None = getattr(engine, "named_parameters", None)
    return None if own is None else _tensors_digest(own())


def _tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes, types and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # A copy, since torch never again resizes a storage that numpy has seen.
        data = tensor.detach().to("cpu", copy=True).contiguous()
        total.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
    return f"sha256:{total.hexdigest()}"


def _servers_digest(engine: SglangEngine) -> str | None:
    phase = "asking for checksums of weights"
    sums: dict[int, tuple[tuple[str, ...], str]] = {}  # tensor-parallel size -> (checksums, a server's URL)
    members = engine.fleet.updatable()
    for member in members:
        work = member.client.post(WEIGHTS_CHECKER, CHECKSUM_BODY, deadline=_CHECKSUM_SECONDS, phase=phase)
        try:
            report = engine.run(work, _CHECKSUM_SECONDS, phase)
        except ServerError as error:
            if error.gone:
                raise
            report = str(error)
        unclear = no_checksums(report)
        if unclear is not None:
            logger.warning(
                "server %s does not say which weights it holds (%s): what is sampled now is never reused",
                member.url,
                unclear,
            )
            return None
        found = fingerprint(report)
        first = sums.setdefault(len(found), (found, member.url))
        if first[0] != found:
            raise ServerMismatch(
                member.url,
                phase,
                f"its weights are not those of {first[1]}: numbers would be of two models; give both the same weights",
            )
    # Checksums are of shards: without a server of its size a part of the identity would be missing.
    sizes = {member.tensor for member in engine.fleet.identified()}
    if not sums or sizes - {member.tensor for member in members}:
        raise ServerGone("of this engine", phase, "none can be asked at the moment")
    text = json.dumps(sorted((size, found) for size, (found, _) in sums.items()))
    return f"checksums:{hashlib.sha256(text.encode()).hexdigest()}"


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _state(number: int) -> tuple[str, int, int, int]:
    """(device and inode, size, mtime, ctime) of an open file, times in nanoseconds."""
    found = os.fstat(number)
    return f"{found.st_dev}:{found.st_ino}", found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_cache(cache: Path | None) -> dict[str, Any]:
    if cache is None or not cache.is_file():
        return {}
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file_digest(number: int, size: int, threads: ThreadPoolExecutor) -> str:
    """SHA-256 over the SHA-256 of its blocks, which threads read and hash at once (hashlib lets go of the GIL)."""

    def block(start: int) -> bytes:
        data = memoryview(bytearray(min(_BLOCK, size - start)))
        done = 0
        while done < len(data) and (got := os.preadv(number, [data[done:]], start + done)):
            done += got
        return hashlib.sha256(data[:done]).digest()

    total = hashlib.sha256(str(size).encode())
    for digest in threads.map(block, range(0, size, _BLOCK)):
        total.update(digest)
    return total.hexdigest()

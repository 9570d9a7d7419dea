"""Files and folders: published whole or not at all, through links; plain JSON in them; one live writer a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megatron_laser.errors import ConfigError

logger = logging.getLogger(__name__)
LOCK = "run.lock"
_TAIL = 1 << 17  # bytes
_LOOK = 0.1  # seconds: longer than `is_locked` takes


def through_links(path: str | Path) -> Path:
    """Where `path` really lies: a link is kept and written through. What it points to need not exist yet."""
    return Path(os.path.realpath(path))


def remove(path: Path) -> None:
    """Delete a file, a folder or a link, but not what the link points to; what cannot be deleted stays."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_file(complete: Path, target: Path) -> None:
    """Rename the file `complete` to `target`; a device or a pipe keeps its name and is written into."""
    if not target.exists() or target.is_file() or target.is_dir():
        os.replace(complete, target)
        return
    with complete.open("rb") as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    complete.unlink()


def replace_folder(partial: Path, target: Path, *, aside: Path) -> None:
    """Rename the complete folder `partial` to `target`; an existing one is moved to `aside` and deleted.

    All three must lie on one file system. Where the rename fails the old folder is put back.
    """
    there = os.path.lexists(target)
    if there:
        remove(aside)
        os.replace(target, aside)
    try:
        os.replace(partial, target)
    except OSError:
        if there:
            os.replace(aside, target)
        raise
    if there:
        remove(aside)


def take_mode(path: Path, like: Path) -> None:
    """Give `path` the permissions of `like`, which was just created beside it as the umask says.

    safetensors writes through a temporary file that only its owner may read.
    """
    os.chmod(path, like.stat().st_mode & 0o777)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy and torch become Python numbers or lists, NaN and infinities None.

    Raises:
        TypeError: neither a number, text, None, nor an array or list of these.
    """
    if hasattr(value, "tolist"):  # numpy and torch, scalars too
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} is neither a number, text nor a list of these: {value!r:.80}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8, so that `path` is the old file or the complete new one, never a part of it.

    A link is kept: the file that it points to is replaced.
    """
    path = through_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def last_lines(path: Path, *, most: int, at_least: int = 0) -> list[dict[str, Any]]:
    """The last JSON objects of a file of lines, oldest first, without reading all of it.

    What cannot be parsed is passed over: a line that is being written, or that a killed run left half.

    Args:
        most: so many at most; 0: all that are in the part that is read.
        at_least: bytes that are read from the end, where there are as many.

    Returns:
        Fewer than `most` only where the file has no more; none where it is missing.
    """
    read = max(at_least, _TAIL)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while True:
                file.seek(max(0, size - read))
                lines = file.read(read).split(b"\n")
                found = _objects(lines if read >= size else lines[1:])
                if read >= size or not most or len(found) >= most:
                    return found[-most:]
                read *= 4
    except OSError:
        return []


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def is_locked(folder: Path, *, name: str = LOCK) -> bool | None:
    """Whether a live process holds the lock of a folder; None where the file system cannot say.

    Taken and let go of at once, in the way that others may, too: `lock_folder` bears it.
    """
    try:
        with (folder / name).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def lock_folder(folder: Path, setting: str, *, name: str = LOCK) -> IO[str]:
    """Take the lock of an existing folder; it is held until the file is closed or the process ends.

    Args:
        setting: what names the folder, for messages: "run.output_dir".
        name: of the file in it that is locked.

    Raises:
        ConfigError: a live process holds it. OSError: the folder cannot be written.
    """
    lock = (folder / name).open("a+", encoding="utf-8")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK)  # somebody only looks, perhaps
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise ConfigError(
            [
                f"{setting} {folder} is in use by a live run{f' ({owner})' if owner else ''}; stop it or "
                f"choose another {setting}"
            ]
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            lock.close()
            raise
        logger.warning("%s %s: no file locks here (%s); never start two runs in it", setting, folder, error)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock

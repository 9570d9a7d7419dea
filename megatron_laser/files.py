"""Publishing files and folders: through links, readable for whom the umask says, the old or the new but no part."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


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

"""A folder that one live process at a time may write into."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from megatron_laser.config import ConfigError

logger = logging.getLogger(__name__)

LOCK = "run.lock"


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

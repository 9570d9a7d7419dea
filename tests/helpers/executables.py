"""Stand-ins for programs: shell scripts that tests put on PATH or name as an interpreter."""

from pathlib import Path


def write_executable(file: Path, text: str) -> str:
    """Make `file`, its folder included, a program of the shell lines `text`; a #! line of its own is kept."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)

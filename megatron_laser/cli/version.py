"""`megatron-laser --version`: by package metadata, so that nothing is imported."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import typer

from megatron_laser import __version__

PACKAGES = ("torch", "megatron-core", "sglang", "transformer-engine", "transformers")
_ROOT = Path(__file__).resolve().parents[2]


def version_lines() -> list[str]:
    """This package's version, its commit where it is a checkout, and those of what it stands on."""
    commit = _commit()
    lines = [f"megatron-laser {__version__}" + (f" (commit {commit})" if commit else "")]
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed in this environment"
    width = max(map(len, found))
    return [*lines, *(f"{name:<{width}}  {version}" for name, version in found.items())]


def _commit() -> str:
    """Of the checkout that this file stands in, with `+changes` where it was changed; "" for an installed package."""
    if not (_ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            [
                "git",
                "-C",
                str(_ROOT),
                "describe",
                "--always",
                "--abbrev=12",
                "--exclude=*",
                "--dirty=+changes",
            ],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def show_version(wanted: bool) -> None:
    """Callback of the option."""
    if wanted:
        for line in version_lines():
            typer.echo(line)
        raise typer.Exit

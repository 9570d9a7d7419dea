"""Asks interpreters for their facts, each in a child with a deadline, and the machine for its GPUs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_laser.rollout.serving.command import child_environment

_FACTS = Path(__file__).with_name("facts.py")
_DEADLINE = (
    180.0  # seconds: the first import of torch and Transformer Engine from a network file system is slow
)


def ask(python: str, environment: Mapping[str, str], deadline: float = _DEADLINE) -> dict[str, str]:
    """The facts of `python`'s environment; {"error": REASON} where it does not run, crashes, or takes too long."""
    command = [python, str(_FACTS)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=deadline, env=dict(environment)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{python} has not answered within {deadline:g} s"}
    except OSError as error:
        return {"error": f"{python} does not run: {error}"}
    if done.returncode < 0:
        return {"error": f"{python} ended with signal {-done.returncode} while it imported its packages"}
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = done.stderr.strip()[-300:] or f"exit status {done.returncode}, and no facts"
        return {"error": f"{python} does not run: {reason}"}
    return {str(name): str(value) for name, value in facts.items()}


def ask_both(trainer: str, servers: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The facts of the trainer's and of the servers' interpreter, side by side; None: there is one for both."""
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(ask, trainer, os.environ)
        if servers is None:
            return ours.result(), ours.result()
        theirs = pool.submit(ask, servers, child_environment(os.environ, python=servers, mark=""))
        return ours.result(), theirs.result()


def gpus() -> dict[str, str]:
    """driver, and the GPUs by number: name and memory, of nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"driver": f"none found: nvidia-smi: {error}"}
    if done.returncode != 0:
        return {"driver": f"none found: nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"}
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        index, name, memory, driver = (part.strip() for part in line.split(","))
        found["driver"] = driver
        found[f"GPU {index}"] = f"{name}, {memory}"
    return found or {"driver": "no GPU"}

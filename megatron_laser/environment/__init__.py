"""What this machine offers: versions and optional parts on both sides, GPUs, and what a run can do with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_laser import __version__
from megatron_laser.config import ConfigError
from megatron_laser.config.schema_rollout import SglangConfig
from megatron_laser.environment.ask import ask_both, gpus
from megatron_laser.environment.verdicts import differences, variables, weight_syncs
from megatron_laser.rollout.serving.command import find_python


def describe(sglang: SglangConfig | None = None) -> dict[str, str]:
    """Name -> value, ready to print. Seconds: interpreters are asked in children, each within a deadline.

    Args:
        sglang: of the configuration whose servers are meant; None: the default interpreter's.
    """
    try:
        python: str | None = find_python(sglang or SglangConfig(), Path.cwd())
        missing = ""
    except ConfigError as error:
        python, missing = None, "; ".join(error.problems)
    one = python is None or _folder(python) == _folder(sys.executable)
    ours, theirs = ask_both(sys.executable, None if one else python)
    if missing:
        theirs = {"error": missing}
    cards = gpus()
    found = {"megatron_laser": __version__, "interpreter": sys.executable} | ours | _of_this_process() | cards
    found["servers' interpreter"] = python or missing
    if not one:
        found |= {f"  servers: {name}": theirs[name] for name in theirs}
        if "error" not in theirs:
            found |= {f"differs: {name}": text for name, text in differences(ours, theirs).items()}
    syncs = weight_syncs(
        ours, theirs, os.environ, python or "none", gpus=any("GPU " in name for name in cards)
    )
    found |= {f"weight_sync {kind}": text for kind, text in syncs.items()}
    return found | variables(os.environ)


def _of_this_process() -> dict[str, str]:
    import torch

    from megatron_laser.model import platform
    from megatron_laser.ops import available_backends

    return {
        "device": platform.device_name(),
        "threads": str(torch.get_num_threads()),
        "log-prob backends": ", ".join(available_backends(platform.device())),
    }


def _folder(python: str) -> str:
    """The folder of an interpreter, which tells environments apart: the python of a virtual one is a link."""
    return os.path.realpath(os.path.dirname(os.path.abspath(python)))

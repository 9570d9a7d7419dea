"""Weights & Biases, on request: the numbers of metrics.jsonl in a browser. The package is imported lazily."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_laser.files import write_atomically

logger = logging.getLogger(__name__)

_ID_FILE = "wandb_id.txt"
_INIT_TIMEOUT = 60.0  # seconds that a start may wait for the server


class WandbSink:
    """One wandb run for each output folder; a resumed run continues it."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._failed = False

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send numbers of one line of metrics.jsonl. A failure is told once and never ends the run."""
        try:
            # Not log(..., step=): wandb drops steps that it has seen, and a resumed run repeats some.
            self._run.log({"step": step, **numbers})
        except Exception as error:
            if not self._failed:
                logger.warning("wandb: step %s could not be logged (%s); metrics.jsonl has it", step, error)
            self._failed = True

    def close(self) -> None:
        """Finish the wandb run; what could not be sent lies in its folder for `wandb sync`."""
        try:
            self._run.finish()
        except Exception as error:
            logger.warning("wandb: the run could not be finished (%s); use `wandb sync` on its folder", error)


def open_wandb(
    output_dir: Path, *, project: str | None, name: str, settings: Mapping[str, Any]
) -> WandbSink | None:
    """Start or continue the wandb run of `output_dir`; None (and one warning) where that is impossible.

    Without an API key the run is recorded offline, below `output_dir`/wandb, for a later `wandb sync`; nothing
    asks for a login. The environment variable WANDB_MODE decides instead where it is set.

    Args:
        project: None is "megatron_laser".
        name: of the run.
        settings: the resolved configuration, shown beside the curves.
    """
    try:
        import wandb
    except ImportError as error:
        logger.warning(
            "logging.wandb is true but wandb cannot be imported (%s); metrics go to metrics.jsonl and TensorBoard "
            "only. Install it with `pip install 'megatron_laser[wandb]'`, or set logging.wandb=false",
            error,
        )
        return None
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb) else "offline")
    arguments = {
        "project": project or "megatron_laser",
        "name": name,
        "id": _run_id(output_dir),
        "dir": str(output_dir),
        "config": dict(settings),
        "resume": "allow",
        "settings": wandb.Settings(init_timeout=_INIT_TIMEOUT, console="off"),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except Exception as error:
        logger.warning("wandb: no connection (%s); this run is recorded offline below %s", error, output_dir)
        try:
            run = wandb.init(mode="offline", **arguments)
        except Exception as offline_error:
            logger.warning(
                "wandb cannot start (%s); metrics go to metrics.jsonl and TensorBoard only", offline_error
            )
            return None
    if mode == "offline":
        logger.info("wandb: recording offline below %s; `wandb sync` sends it later", output_dir / "wandb")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return WandbSink(run)


def _has_key(wandb: Any) -> bool:
    """Whether wandb would log in without asking: its prompt would wait behind the live view."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # before `prompt` was there
        return bool(wandb.api.api_key)
    except Exception:
        return False


def _run_id(output_dir: Path) -> str:
    """The same for every start in the same output folder."""
    file = output_dir / _ID_FILE
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text(encoding="utf-8").strip()

"""The folder of a run: claimed before anything expensive, never shared by two runs."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from megatron_laser.config import ConfigError, RunConfig, resolved_yaml

_IDENTITY = "run.json"


def claim_output_folder(config: RunConfig) -> Path:
    """Create `run.output_dir` and write the resolved configuration and the run's identity into it.

    Raises:
        ConfigError: the folder belongs to another run or cannot be written.
    """
    folder = Path(config.run.output_dir)
    identity = folder / _IDENTITY
    if identity.exists() or (folder / "metrics.jsonl").exists():
        raise ConfigError(
            [
                f"run.output_dir {folder} already holds a run{_started(identity)}; choose another run.output_dir, "
                "or pass --overwrite to move the old folder aside"
            ]
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = resolved_yaml(config)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        record = {
            "name": config.run.name,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        identity.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"run.output_dir {folder} cannot be written: {error}"]) from error
    return folder


def move_aside(folder: Path) -> Path | None:
    """Rename an existing output folder to `<folder>.old-N`; returns the new name, None if there was none."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, target)
    return target


def _started(identity: Path) -> str:
    try:
        record = json.loads(identity.read_text(encoding="utf-8"))
        return f" ({record['name']!r}, started {record['started']})"
    except (OSError, ValueError, KeyError):
        return ""

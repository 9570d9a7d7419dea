"""What lies beside the checkpoint that a run goes on from and is not used, and why not; in words, files only."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_laser.trainer.checkpoint.folder import published

_NAME = re.compile(r"step_(\d{8})(\..*)?")


def passed_over(root: Path, chosen: int) -> list[str]:
    """Each folder of a step after `chosen` (-1: none is used) that a reader might take for a newer checkpoint.

    Args:
        root: of the checkpoints, before `remove_partials` has deleted what was never published.
    """
    if not root.is_dir():
        return []
    complete = {path.name for _, path in published(root)}
    told = []
    for path in sorted(root.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) <= chosen:
            continue
        if match[2] is not None:
            if match[2] == ".partial":
                told.append(
                    f"{path.name}: the run ended while it was written, and it was never published; deleted"
                )
        elif path.name in complete:
            told.append(f"{path.name}: newer, but another one was asked for; it stays")
        else:
            told.append(f"{path.name}: not complete, it has no state.json; left as it is")
    return told

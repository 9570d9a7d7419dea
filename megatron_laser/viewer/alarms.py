"""Alarms of a run that is viewed, computed from its metrics by the rules that watch a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_laser.files import plain
from megatron_laser.observability.alarms import alarms_of, settings_of


def run_alarms(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Alarms as JSON holds them; of the run's own thresholds."""
    found = alarms_of(rows, settings_of(config))
    return [{name: plain(value) for name, value in asdict(alarm).items()} for alarm in found]

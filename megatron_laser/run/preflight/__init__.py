"""Preflight: what a run starts from, checked before anything expensive: model folder, tokenizer, data, reward, disks.

`train` calls `run_preflight` and stops at the first error; `megatron-laser check` calls it and prints everything.
"""

from megatron_laser.run.preflight.checks import PreflightResult, run_preflight
from megatron_laser.run.preflight.finding_log import CheckFailed, FindingLog

__all__ = ["CheckFailed", "FindingLog", "PreflightResult", "run_preflight"]

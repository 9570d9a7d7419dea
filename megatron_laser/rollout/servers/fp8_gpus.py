"""Whether a node's GPUs can hold FP8 weights that are loaded again and again (`config/model_folder/quantized.py`)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.config.model_folder.quantized import CAPABILITIES
from megatron_laser.rollout.sglang_api import parse_version

_ASK_DEADLINE = 30.0  # seconds


def check_gpus(config: RunConfig) -> None:
    """Does nothing without `rollout.sglang.quantization`, or where nvidia-smi does not tell.

    Call on the node whose GPUs servers will have. Raises ConfigError.
    """
    sglang = config.rollout.sglang
    if sglang.quantization is None or sglang.device != "cuda":
        return
    if problems := capability_problems(_capabilities()):
        raise ConfigError(problems)


def capability_problems(capabilities: Sequence[str]) -> list[str]:
    """What is wrong with GPUs of these compute capabilities, "9.0"."""
    first, end = CAPABILITIES
    wrong = sorted({text for text in capabilities if not first <= parse_version(text) < end})
    return [
        f"rollout.sglang.quantization: fp8 on GPUs of compute capability {', '.join(wrong)}: SGLang keeps FP8 weights "
        "there in a form that takes no new ones (packed for Marlin below 8.9, scales of powers of two from 10.0 on); "
        "use Ada or Hopper, or null"
    ] * bool(wrong)


def _capabilities() -> list[str]:
    """Of this node's GPUs; [] where nvidia-smi is missing or does not say."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_DEADLINE)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [line for line in lines if parse_version(line)]

"""The states of all random generators of this process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def collect_random_states() -> dict[str, Any]:
    """Python's, numpy's, torch's and Megatron's model-parallel generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "model_parallel": get_cuda_rng_tracker().get_states(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of `collect_random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["model_parallel"])

"""The precision that losses are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself in float64, which tests and gradient checks use, otherwise as float32."""
    return x if x.dtype == torch.float64 else x.float()

"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

_GIB = 2**30


def memory_metrics() -> dict[str, float]:
    """memory/peak_rss_gib since the process began, and on a CUDA device memory/peak_device_gib.

    The device's is the allocator's peak since the last `torch.cuda.reset_peak_memory_stats`; torch is asked
    only if the process uses CUDA already.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = {"memory/peak_rss_gib": peak * (1 if sys.platform == "darwin" else 1024) / _GIB}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        metrics["memory/peak_device_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return metrics

"""What this machine offers: versions and optional parts, for bug reports and for choosing settings."""

from __future__ import annotations

import importlib.metadata
import platform as host
import sys

from megatron_laser import __version__

_PACKAGES = (
    *("torch", "megatron-core", "transformers", "safetensors", "math-verify", "pydantic", "tensorboard"),
    *("transformer-engine", "apex", "triton", "flash-attn", "sglang", "wandb"),
)


def describe() -> dict[str, str]:
    """Name -> value, ready to print."""
    import torch

    from megatron_laser.model import platform
    from megatron_laser.ops import available_backends

    found = {"megatron_laser": __version__, "python": f"{sys.version.split()[0]} on {host.platform()}"}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["device"] = platform.device_name()
    found["threads"] = str(torch.get_num_threads())
    found["log-prob backends"] = ", ".join(available_backends(platform.device()))
    return found

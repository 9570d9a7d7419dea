"""Whether layers are built from Transformer Engine modules."""

from __future__ import annotations

from megatron_laser.model import platform

try:
    import transformer_engine.pytorch  # noqa: F401

    _HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    _HAVE_TRANSFORMER_ENGINE = False


def use_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine modules: on CUDA where it is installed."""
    return _HAVE_TRANSFORMER_ENGINE and platform.has_cuda()

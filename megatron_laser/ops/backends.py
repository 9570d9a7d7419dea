"""The implementations behind the log-prob op, and how a call picks one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_laser.ops import device as triton_device
from megatron_laser.ops import reference as torch_reference
from megatron_laser.ops.types import LogProbs


@dataclass(frozen=True)
class Backend:
    """One implementation. The two functions take the arguments of the public calls, already checked.

    unavailable: given the device of the inputs, why this backend cannot run there, or None when it can.
    automatic: whether "auto" may take it on that device.
    """

    name: str
    linear_logprob: Callable[..., LogProbs]
    few_row_logprob: Callable[..., torch.Tensor]
    unavailable: Callable[[torch.device], str | None]
    automatic: Callable[[torch.device], bool] = lambda device: True


def _triton_linear_logprob(*args: Any, **kwargs: Any) -> LogProbs:
    # Imported at the first call: the kernels need the package triton, which a CPU installation may lack.
    from megatron_laser.ops import gpu_backend as triton_backend

    return triton_backend.linear_logprob(*args, **kwargs)


def _triton_few_row_logprob(*args: Any, **kwargs: Any) -> torch.Tensor:
    from megatron_laser.ops import gpu_backend as triton_backend

    return triton_backend.few_row_logprob(*args, **kwargs)


# Fastest first: "auto" takes the first that is available on the device of the inputs.
_BACKENDS = (
    Backend(
        name="triton",
        linear_logprob=_triton_linear_logprob,
        few_row_logprob=_triton_few_row_logprob,
        unavailable=triton_device.unavailable,
        automatic=lambda device: device.type == "cuda",
    ),
    Backend(
        name="torch",
        linear_logprob=torch_reference.linear_logprob,
        few_row_logprob=torch_reference.few_row_logprob,
        unavailable=lambda device: None,
    ),
)


def available_backends(device: torch.device) -> list[str]:
    """Names of the backends that run on `device`, fastest first."""
    return [backend.name for backend in _BACKENDS if backend.unavailable(device) is None]


def resolve_backend(name: str, device: torch.device) -> Backend:
    """The backend `name`, or the fastest available one for "auto".

    Raises ValueError for an unknown name and RuntimeError for one that cannot run on `device`: a backend that
    was asked for is never replaced silently.
    """
    if name == "auto":
        return next(
            backend
            for backend in _BACKENDS
            if backend.automatic(device) and backend.unavailable(device) is None
        )
    for backend in _BACKENDS:
        if backend.name == name:
            reason = backend.unavailable(device)
            if reason is None:
                return backend
            raise RuntimeError(
                f"backend={name!r} cannot run on {device}: {reason}. "
                f"Available here: auto, {', '.join(available_backends(device))}."
            )
    raise ValueError(
        f"backend={name!r} is unknown. Available on {device}: auto, {', '.join(available_backends(device))}."
    )

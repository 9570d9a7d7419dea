"""Do the servers hold what the trainer sent? Their checksums against ours, parameter by parameter.

SGLang keeps query, key and value in one parameter and gate and up projection in another; on a CPU its checksum is
the start of the SHA-256 of a parameter's bytes, so ours is made of the streamed tensors in that order. On GPUs it
uses a hash of its own: there the servers are compared with each other, and sampled values with the trainer's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_FUSED = (
    (re.compile(r"(.*\.self_attn\.)[qkv]_proj\.(weight|bias)"), r"\1qkv_proj.\2"),
    (re.compile(r"(.*\.mlp\.)(?:gate|up)_proj\.(weight)"), r"\1gate_up_proj.\2"),
)
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64  # SGLang pads the vocabulary's rows with zeros to a multiple of this
_SAMPLED_VALUES = 64  # of a row, compared on GPUs


class StreamDigest:
    """Passes a weight stream on and notes what a server should report afterwards."""

    def __init__(self, *, dtype: torch.dtype, hashed: bool) -> None:
        """Args: hashed: make SHA-256 sums (servers on CPUs); else keep some values of each tensor only."""
        self._dtype = dtype
        self._hashed = hashed
        self._sums: dict[str, Any] = {}
        self.values: dict[str, list[float]] = {}

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same stream."""
        for name, tensor in weights:
            if self._hashed:
                self._hash(name, tensor)
            else:
                row = tensor.detach().reshape(-1)[:_SAMPLED_VALUES].to(self._dtype)
                self.values[name] = row.float().cpu().tolist()
            yield name, tensor

    def _hash(self, name: str, tensor: torch.Tensor) -> None:
        # A copy, since torch never again resizes a storage that numpy has seen: the trainer's must be able to leave.
        data = tensor.detach().to(device="cpu", dtype=self._dtype, copy=True).contiguous()
        digest = self._sums.setdefault(server_name(name), hashlib.sha256())
        digest.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
        missing = -len(data) % _VOCABULARY_MULTIPLE
        if name in _PADDED and missing:
            digest.update(bytes(missing * data[0].nbytes))

    def sums(self) -> dict[str, str]:
        """The server's parameter name -> 16 hex digits."""
        return {name: digest.digest()[:8].hex() for name, digest in self._sums.items()}


def server_name(name: str) -> str:
    """SGLang's parameter that holds the Hugging Face tensor `name`."""
    for pattern, replacement in _FUSED:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    return name


def no_checksums(reported: Any) -> str | None:
    """Why a server's `/weights_checker` answer cannot be compared, and so must not pass for one that agrees.

    None when it can.
    """
    ranks = reported.get("ranks") if isinstance(reported, dict) else None
    whole = isinstance(ranks, list) and all(
        isinstance(rank, dict) and isinstance(rank.get("checksums"), dict) and rank.get("per_gpu_checksum")
        for rank in ranks
    )
    return None if ranks and whole else f"its answer has no checksums: {str(reported)[:200]}"


def differences(sums: dict[str, str], reported: dict[str, Any]) -> list[str]:
    """What of a server's `/weights_checker` answer differs from `sums`; empty when all agrees.

    With a tensor-parallel size above 1 a rank holds parts, which these sums say nothing about: no statement.
    """
    ranks = reported["ranks"]
    if len(ranks) != 1:
        return []
    theirs = ranks[0]["checksums"]
    wrong = [
        f"{name}: {theirs[name]} instead of {ours}"
        for name, ours in sums.items()
        if name in theirs and theirs[name] != ours
    ]
    unknown = [name for name in sums if name not in theirs and not _may_be_tied(name, theirs)]
    return wrong + [f"{name}: the server has no such parameter" for name in unknown]


def fingerprint(reported: dict[str, Any]) -> tuple[str, ...]:
    """What must be equal on all servers of one tensor-parallel size."""
    ordered = sorted(reported["ranks"], key=lambda rank: str(rank.get("parallelism_info")))
    return tuple(str(rank["per_gpu_checksum"]) for rank in ordered)


def _may_be_tied(name: str, theirs: dict[str, str]) -> bool:
    return name == "lm_head.weight" and "model.embed_tokens.weight" in theirs

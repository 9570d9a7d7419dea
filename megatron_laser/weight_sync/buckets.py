"""The weight stream cut into buckets of bounded size, each one contiguous block of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together. `last`: none follows.

    tensors: (Hugging Face name, tensor), all of one dtype. Copies: the model may go on.
    """

    tensors: tuple[tuple[str, torch.Tensor], ...]
    last: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors)

    def flat(self) -> torch.Tensor:
        """[nbytes] uint8, the tensors one after the other: SGLang's `flattened_bucket` layout."""
        return torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in self.tensors])

    def describe(self) -> dict[str, list]:
        """names, dtypes and shapes as `sglang_api.from_distributed_body` takes them."""
        return {
            "names": [name for name, _ in self.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in self.tensors],
            "shapes": [list(tensor.shape) for _, tensor in self.tensors],
        }


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int, *, dtype: torch.dtype | None = None
) -> Iterator[Bucket]:
    """Cut the stream, in its order, into buckets of at most `limit` bytes (one tensor may be larger).

    A bucket holds one dtype only, so that every tensor in it is aligned. It is complete when a tensor comes that does
    not fit, which also tells that it is not the last: nothing but that tensor is held beside it.

    Args:
        dtype: what tensors are converted to; None: as they are.
    """
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        copy = tensor.detach().to(dtype=dtype, copy=True).contiguous()
        other = bool(part) and part[0][1].dtype != copy.dtype
        if part and (other or size + copy.nbytes > limit):
            yield Bucket(tuple(part), last=False)
            part, size = [], 0
        part.append((name, copy))
        size += copy.nbytes
    if part:
        yield Bucket(tuple(part), last=True)

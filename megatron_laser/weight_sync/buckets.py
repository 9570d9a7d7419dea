"""The weight stream cut into buckets of bounded size, each one contiguous block of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together. `last`: none follows.

    tensors: (Hugging Face name, tensor), those with larger elements first, so that all are aligned in `flat`: SGLang
    refuses others (`weight_sync/tensor_bucket.py`, 0.5.23). Copies: the model may go on.
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


def buckets(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[Bucket]:
    """Cut the stream, in its order, into buckets of at most `limit` bytes (one tensor may be larger).

    A bucket is complete when a tensor comes that does not fit, which also tells that it is not the last: nothing but
    that tensor is held beside it.
    """
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        if part and size + copy.nbytes > limit:
            yield _bucket(part, last=False)
            part, size = [], 0
        part.append((name, copy))
        size += copy.nbytes
    if part:
        yield _bucket(part, last=True)


def _bucket(part: list[tuple[str, torch.Tensor]], *, last: bool) -> Bucket:
    return Bucket(tuple(sorted(part, key=lambda item: -item[1].itemsize)), last)

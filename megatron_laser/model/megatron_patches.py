"""What layers without Transformer Engine need changed in Megatron-Core, on a CPU and on CUDA, and what gloo needs.

Rotary embedding of packed sequences, a name that upstream leaves unbound, and the exchange of experts' tokens
(`_patch_expert_exchange`, for CPUs). The functions are private: read in 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from megatron_laser.batching.context import context_positions, sequence_positions


@functools.cache
def patch_megatron() -> None:
    """Change what is wrong or slow in Megatron-Core 0.19 without Transformer Engine. Idempotent."""
    # moe_utils names te_general_gemm without binding it when Transformer Engine is missing.
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not getattr(moe_utils, "HAVE_TE", False):
        moe_utils.te_general_gemm = None
    _patch_expert_exchange()
    # The unfused THD rotary embedding slices once per sequence in Python, for q and k of every layer. With hundreds
    # of short sequences a micro-batch that costs more than the matrix products, and on CUDA it waits for the device
    # each time, to read the lengths. One table per micro-batch gives the same values.
    rope: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    original = rope._apply_rotary_pos_emb_thd
    table = _RotaryTable()

    def apply_thd(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, **kwargs: Any) -> Any:
        group = kwargs.pop("cp_group", None)
        special = kwargs.get("multi_latent_attention") or kwargs.get("mla_rotary_interleaved")
        plain = not special and kwargs.get("mscale", 1.0) == 1.0
        if group is None or not plain or freqs.shape[-1] != t.shape[-1]:
            if _positions_of(cu_seqlens) is not None:
                raise ValueError(
                    "this model's rotary embedding starts at 0 in every sequence: share no prompts"
                )
            return original(t, cu_seqlens, freqs, cp_group=group, **kwargs)
        cos, sin = table.of(t, cu_seqlens, freqs, group.size(), group.rank())
        return t * cos + rope._rotate_half(t, kwargs.get("rotary_interleaved", False)) * sin

    apply_thd.original = original  # type: ignore[attr-defined]
    rope._apply_rotary_pos_emb_thd = apply_thd


def _patch_expert_exchange() -> None:
    """What the all-to-all of experts' tokens needs on a CPU and over gloo."""
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    move = dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Split sizes never were on a GPU: upstream they stay tensors, which torch refuses.
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    dispatcher.maybe_move_tensor_to_cpu = moved
    # Experts that are split themselves gather the tokens of their ranks, so many from each. Gloo gathers equal parts.
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gathered(own: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or own.is_cuda or group.size() == 1:
            return gather(own, group, sizes, use_global_buffer)
        largest = max(sizes)
        if not largest:
            return own
        equal = gather(_padded(own, largest), group)
        return torch.cat([part[:size] for part, size in zip(equal.split(largest), sizes, strict=True)])

    def scattered(whole: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or whole.is_cuda or group.size() == 1:
            return scatter(whole, group, sizes, use_global_buffer)
        sizes = [int(size) for size in sizes]
        parts = [_padded(part, max(sizes)) for part in whole.split(sizes)]
        return scatter(torch.cat(parts), group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gathered, scattered


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def set_positions(cu_seqlens: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotary positions [tokens] int64 of the packed tokens whose sequences start elsewhere than at 0.

    Megatron hands its rotary functions nothing of a micro-batch but `cu_seqlens`.
    """
    cu_seqlens.rotary_positions = positions  # type: ignore[attr-defined]


def _positions_of(cu_seqlens: torch.Tensor) -> torch.Tensor | None:
    return getattr(cu_seqlens, "rotary_positions", None)


class _RotaryTable:
    """cos and sin [tokens, 1, head_dim] of the last micro-batch seen."""

    def __init__(self) -> None:
        self._key: tuple[torch.Tensor, torch.Tensor, torch.dtype] | None = None
        self._values: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(
        self, t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, size: int, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The table for the packed tokens `t` of context rank `rank` of `size`.

        It is built anew when the packing, the frequencies or the dtype change.
        """
        key = self._key
        # Recomputation hands in a detached copy of the frequencies, in the same memory.
        same = key is not None and key[0] is cu_seqlens and _is_view(key[1], freqs) and key[2] == t.dtype
        if not same:
            angles = freqs.squeeze(1)[_positions(t.shape[0], cu_seqlens, freqs.shape[0], size, rank)]
            self._key = (cu_seqlens, freqs, t.dtype)
            self._values = (angles.cos().to(t.dtype), angles.sin().to(t.dtype))
        assert self._values is not None
        return self._values


def _is_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _positions(
    own_tokens: int, cu_seqlens: torch.Tensor, frequencies: int, size: int, rank: int
) -> torch.Tensor | slice:
    """Which frequency each of a context rank's tokens has: its place in its sequence."""
    known = _positions_of(cu_seqlens)
    if known is not None:
        return known
    # As many frequencies as packed tokens are one for each token, upstream; else every sequence starts at 0.
    for_each_token = frequencies == size * own_tokens
    if size > 1:
        bounds = cu_seqlens.cpu().numpy()
        places = (context_positions if for_each_token else sequence_positions)(bounds, size=size, rank=rank)
        return torch.from_numpy(places).to(cu_seqlens.device)
    if for_each_token:
        return slice(None)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    # With output_size nothing has to be read back from a GPU.
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=own_tokens)
    return torch.arange(own_tokens, device=cu_seqlens.device) - starts

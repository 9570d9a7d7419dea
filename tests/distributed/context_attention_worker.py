"""Attention and rotary embedding of sequences that are split over gloo ranks, against whole sequences in float64.

Started by test_context_attention.py on 2 and on 4 ranks; exits non-zero when a claim does not hold.
"""

import sys
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from helpers.models import tiny_config
from helpers.packed import packed_params
from helpers.torchrun import run_worker
from megatron.core import parallel_state

from megatron_laser.batching.context import context_positions
from megatron_laser.distributed import communicators
from megatron_laser.model import context_attention, platform

platform.install()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from megatron_laser.model.hf_config import transformer_config  # noqa: E402
from megatron_laser.model.torch_layers import PackedSdpaAttention  # noqa: E402

HEADS, HEAD_DIM = 4, 16
# In units of 2 x ranks tokens: long and short ones, equal ones, one alone, a sequence without tokens.
LENGTHS = [(1, 9, 1, 4, 4, 2), (12,), (1, 1, 1), (3, 0, 5)]


def reference(q, k, v, bounds):
    """softmax(q k^T / sqrt(d) + causal mask) v of whole sequences, one sequence and one head at a time."""
    out = []
    for start, stop in pairwise(bounds):
        length = stop - start
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        heads = []
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // k.shape[1])
            logits = q[start:stop, head] @ k[start:stop, kv_head].T / q.shape[2] ** 0.5
            heads.append(logits.masked_fill(future, -torch.inf).softmax(-1) @ v[start:stop, kv_head])
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out)


def check_attention(attention, params, kv_heads, dtype, tolerance):
    group = parallel_state.get_context_parallel_group()
    size, rank = group.size(), group.rank()
    bounds = params.cu_seqlens_q.tolist()
    generator = torch.Generator().manual_seed(len(bounds))
    shapes = ((HEADS, 3.0), (kv_heads, 1.0), (kv_heads, 1.0), (HEADS, 1.0))
    *inputs, weights = (
        torch.randn(bounds[-1], heads, HEAD_DIM, generator=generator, dtype=torch.float64) * scale
        for heads, scale in shapes
    )
    inputs = [x.to(dtype).double() for x in inputs]  # what the rank's dtype can say
    own = torch.from_numpy(context_positions(np.array(bounds), size=size, rank=rank))
    mine = [x[own].to(dtype).requires_grad_() for x in inputs]
    out = attention(*mine, attention_mask=None, packed_seq_params=params)
    (out * weights[own].to(dtype)).sum().backward()
    plain = [x.requires_grad_() for x in inputs]
    expected = reference(*plain, bounds)
    (expected * weights).sum().backward()
    assert_close(out, expected[own], tolerance)
    for got, want in zip(mine, plain):
        assert got.grad.dtype == dtype
        assert_close(got.grad, want.grad[own], tolerance)


def assert_close(got, want, tolerance):
    if got.dtype != torch.bfloat16:
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    else:  # an entry may be a difference of larger ones, rounded
        error = float((got.double() - want).norm() / want.norm())
        assert error <= tolerance, error


def check_rotary(params):
    group = parallel_state.get_context_parallel_group()
    bounds = params.cu_seqlens_q
    own = torch.from_numpy(context_positions(bounds.numpy(), size=group.size(), rank=group.rank()))
    t = torch.randn(int(bounds[-1]), HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    inverse = 1.0 / 100.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    apply = rope_utils._apply_rotary_pos_emb_thd
    for count in {params.max_seqlen_q, params.max_seqlen_q + 7, int(bounds[-1])}:
        angles = torch.arange(count)[:, None] * inverse
        freqs = torch.cat([angles, angles], dim=-1)[:, None, None, :]
        got = apply(t[own], bounds, freqs, cp_group=group)
        upstream = apply.original(t[own], bounds, freqs, cp_group=group)
        torch.testing.assert_close(got, upstream, atol=1e-6, rtol=1e-6)
        if count == int(bounds[-1]) and len(params.cu_seqlens_q) > 2:
            continue  # then they are one for each packed token, upstream
        whole = []
        for piece in t.split(bounds.diff().tolist()):
            first, second = piece.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            whole.append(piece * freqs[: len(piece), 0].cos() + turned * freqs[: len(piece), 0].sin())
        torch.testing.assert_close(got, torch.cat(whole)[own], atol=1e-6, rtol=1e-6)


def main():
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    communicators.bring_up(30.0, paired_stages=False, paired_context=True)
    config = transformer_config(tiny_config("qwen2"), dtype=torch.float32, context=size)
    collection = type("Groups", (), {"cp": parallel_state.get_context_parallel_group()})
    attention = PackedSdpaAttention(
        config, layer_number=1, attn_mask_type=None, attention_type="self", pg_collection=collection
    )
    for units in LENGTHS:
        check_rotary(packed_params([2 * size * unit for unit in units]))
        for kv_heads in (1, 2, 4):
            for entries in (
                1 << 22,
                200,
                1,
            ):  # the last two: several blocks of queries, and one query at a time
                context_attention._MASK_ENTRIES = entries
                params = packed_params([2 * size * unit for unit in units])
                check_attention(attention, params, kv_heads, torch.float64, 1e-12)
                layout = params.context_layout
                check_attention(attention, params, kv_heads, torch.float32, 1e-4)
                assert params.context_layout is layout  # worked out once per micro-batch
        check_attention(
            attention, packed_params([2 * size * unit for unit in units]), 2, torch.bfloat16, 0.01
        )
    try:
        attention(*torch.zeros(3, 4, 1, HEADS, HEAD_DIM), attention_mask=None)
    except ValueError as error:
        assert "packed" in str(error)
    else:
        raise AssertionError("unpacked input was not refused")
    dist.barrier()


if __name__ == "__main__":
    sys.argv[1:] = []
    run_worker(main)

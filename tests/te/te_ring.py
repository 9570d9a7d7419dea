"""Transformer Engine's ring of keys and values alone, against whole sequences: the kernels are stand-ins in float64.

What is compared is the order of a rank's tokens (`batching.context_positions`), which chunks meet in which step, and
how partial results are added up.
"""

import itertools

HEADS, HEAD_DIM = 4, 8
# In units of 2 x ranks tokens.
LENGTHS = [(1, 5, 2), (3,), (1, 1)]


def extremes(groups):
    """{"least", "most"}: of all ranks' `ring_errors`, one pair for each group."""
    import torch
    import torch.distributed as dist

    errors = torch.tensor(ring_errors(groups))
    most = errors.clone()
    dist.all_reduce(errors, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"least": errors.tolist(), "most": most.tolist()}


def ring_errors(groups):
    """For each group: (largest error in our order of tokens, smallest with a rank's tokens in one piece)."""
    import numpy as np
    import te_attention
    import torch
    import torch.distributed as dist
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    from megatron_laser.batching.context import context_positions

    te_attention.dtypes.add(torch.float64)

    def ring(q, k, v, bounds, group):
        longest = int(bounds.diff().max())
        return context_parallel.attn_forward_func_with_cp(
            True, q, k, v, bounds, bounds, longest, longest, bounds, bounds, 0.0,
            group, dist.get_process_group_ranks(group), context_parallel.torch.cuda.Stream(), "p2p",
            qkv_format="thd", attn_mask_type="padding_causal", use_fused_attention=True, window_size=(-1, 0),
        )  # fmt: skip

    def whole(q, k, v, bounds):
        parts = (x.split(bounds.diff().tolist()) for x in (q, k, v))
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in one), is_causal=True, enable_gqa=True
                ).transpose(0, 1)
                for one in zip(*parts)
            ]
        )

    def errors(units, kv_heads, own_of, group):
        """Largest errors of out, dq, dk and dv on this rank."""
        size = group.size()
        bounds = torch.tensor([0, *(2 * size * unit for unit in units)]).cumsum(0).to(torch.int32)
        generator = torch.Generator().manual_seed(kv_heads)
        *inputs, towards = (
            torch.randn(int(bounds[-1]), heads, HEAD_DIM, generator=generator, dtype=torch.float64)
            for heads in (HEADS, kv_heads, kv_heads, HEADS)
        )
        own = torch.from_numpy(own_of(bounds.numpy(), size=size, rank=group.rank()))
        mine = [x[own].requires_grad_() for x in inputs]
        out = ring(*mine, bounds, group).view(len(own), HEADS, HEAD_DIM)
        out.backward(towards[own])
        plain = [x.requires_grad_() for x in inputs]
        expected = whole(*plain, bounds)
        expected.backward(towards)
        both = [(out, expected), *((x.grad, y.grad) for x, y in zip(mine, plain))]
        return [float((got - want[own]).detach().abs().max()) for got, want in both]

    def in_one_piece(bounds, *, size, rank):
        return np.concatenate([np.split(np.arange(*ends), size)[rank] for ends in itertools.pairwise(bounds)])

    found = []
    for group in groups:
        cases = itertools.product(LENGTHS, (1, 2, 4))
        ours = [error for case in cases for error in errors(*case, context_positions, group)]
        found.append((max(ours), min(errors(LENGTHS[0], 2, in_one_piece, group))))
    return found

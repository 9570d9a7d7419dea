"""Stand-ins for the attention kernels: packed attention by its stored statistics, and what the context ring adds up.

As in the real ones a backward makes the probabilities anew of q, k and the log-sum-exp it is handed, and takes
the output it is handed for the rows' sums: in a ring both are of the whole sequence, not of the step.
Everything is computed in float32, for float64 inputs in float64.
"""

import itertools
import math

import torch

#: What the kernels take. The test of the ring alone adds float64, to see more than the rounding of 16 bits.
dtypes = {torch.float16, torch.bfloat16}


def packed_forward(q, k, v, bounds_q, bounds_kv, scale, causal):
    """(out [tokens, heads, head_dim], log-sum-exp [tokens, heads, 1] fp32) of each query sequence and its keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=wide)
    for rows, columns in _sequences(bounds_q, bounds_kv):
        logits = _logits(q[rows].to(wide), _grouped(k[columns].to(wide), q), scale, causal)
        lse[rows] = logits.logsumexp(-1).t().unsqueeze(-1)
        values = _grouped(v[columns].to(wide), q).transpose(0, 1)
        out[rows] = (logits.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
    return out, lse


def packed_backward(q, k, v, out, grad_out, lse, bounds_q, bounds_kv, scale, causal):
    """[dq, dk, dv] in the inputs' dtypes."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
    for rows, columns in _sequences(bounds_q, bounds_kv):
        queries, towards = q[rows].to(wide), grad_out[rows].to(wide).transpose(0, 1)
        keys, values = (_grouped(x[columns].to(wide), q) for x in (k, v))
        logits = _logits(queries, keys, scale, causal)
        p = (logits - lse[rows].squeeze(-1).t().unsqueeze(-1)).exp()
        sums = (towards * out[rows].to(wide).transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (towards @ values.permute(1, 2, 0) - sums) * scale
        grads[0][rows] = (ds @ keys.transpose(0, 1)).transpose(0, 1)
        for grad, whole in (
            (grads[1], ds.transpose(1, 2) @ queries.transpose(0, 1)),
            (grads[2], p.mT @ towards),
        ):
            heads = whole.transpose(0, 1)
            grad[columns] = heads.view(heads.shape[0], k.shape[1], -1, heads.shape[-1]).sum(2)
    return [grad.to(x.dtype) for grad, x in zip(grads, (q, k, v))]


def _sequences(bounds_q, bounds_kv):
    pairs = (itertools.pairwise(bounds.tolist()) for bounds in (bounds_q, bounds_kv))
    return [tuple(slice(*ends) for ends in both) for both in zip(*pairs, strict=True)]


def _grouped(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _logits(q, k, scale, causal):
    logits = q.transpose(0, 1) @ k.permute(1, 2, 0) * scale
    if causal:
        assert q.shape[0] == k.shape[0]
        logits = logits + torch.full(logits.shape[1:], -math.inf, dtype=logits.dtype).triu(1)
    return logits


def _half(cu_seqlens, second):
    """Rows of the first or the second half of each sequence."""
    parts = [torch.arange(a, b).chunk(2)[second] for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
    return torch.cat(parts)


def thd_read_half_tensor(tensor, cu_seqlens, half):
    """The first (0) or second (1) half of each sequence of [tokens, heads, head_dim]."""
    _whole(tensor, cu_seqlens)
    assert tensor.shape[1] * tensor.shape[2] * tensor.element_size() % 16 == 0, "loads of 128 bits"
    return tensor[_half(cu_seqlens, half)]


def thd_read_second_half_lse(lse, cu_seqlens, packed, width):
    """[heads, tokens] to [heads, width], width being half of the tokens."""
    assert packed and lse.dim() == 2 and width == lse.shape[1] // 2
    return lse[:, _half(cu_seqlens, 1)]


def thd_second_half_lse_correction(lse, of_step, cu_seqlens, packed):
    """Adds a step's [heads, tokens / 2] to the second halves of lse [heads, tokens], in place."""
    assert packed and lse.dim() == of_step.dim() == 2
    rows = _half(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], of_step)


def thd_out_correction(out, of_step, old_lse, lse, lse_of_step, cu_seqlens, only_second_half, packed):
    """out [tokens, heads, head_dim] = out exp(old_lse - lse) + of_step exp(lse_of_step - lse), in place.

    With `only_second_half` that of each sequence alone, and the step has just these rows.
    """
    assert packed and out.dtype == of_step.dtype and out.is_contiguous() and of_step.is_contiguous()
    _whole(out, cu_seqlens)
    rows = _half(cu_seqlens, 1) if only_second_half else torch.arange(out.shape[0])
    old, new = (torch.exp(x - lse[:, rows]).t().unsqueeze(-1) for x in (old_lse[:, rows], lse_of_step))
    out[rows] = (out[rows] * old + of_step.view(-1, *out.shape[1:]) * new).to(out.dtype)


def thd_grad_correction(grad, of_step, cu_seqlens, first, second):
    """ "add" a step's gradient to a half of each sequence, "copy" it there, or leave the half, "none", in place."""
    _whole(grad, cu_seqlens)
    assert grad.dtype == of_step.dtype and {first, second} in (
        {"add", "none"},
        {"copy", "none"},
        {"add", "copy"},
    )
    rows = [_half(cu_seqlens, half) for half in (0, 1)]
    given = [half for half, what in enumerate((first, second)) if what != "none"]
    whole = grad.new_zeros(grad.shape)
    whole[torch.cat([rows[half] for half in given]).sort().values] = of_step.view(-1, *grad.shape[1:])
    for half, what in enumerate((first, second)):
        if what == "add":
            grad[rows[half]] += whole[rows[half]]
        elif what == "copy":
            grad[rows[half]] = whole[rows[half]]


def _whole(tensor, cu_seqlens):
    assert cu_seqlens.dtype == torch.int32 and int(cu_seqlens[-1]) == tensor.shape[0]
    assert not bool((cu_seqlens.diff() % 2).any()), "two chunks of every sequence"

"""A stand-in for `transformer_engine_torch`, Transformer Engine's compiled extension: its calls in torch's arithmetic.

It has the kernels that a dense model in bf16 or fp32 needs, with the arguments, shapes and dtypes of version 2.20, and
computes in fp32 as the kernels do. It refuses what the real kernels refuse where the refusal depends on the caller
(dtypes, packing, masks). Any other name exists, so that the Python classes can be imported and mention it, and raises
when it is called. `calls` counts what was called.
"""

import collections
import enum
import itertools
import math

import torch

calls: collections.Counter[str] = collections.Counter()

DType = enum.IntEnum(
    "DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1", start=0
)
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors",
    "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    start=0,
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
)
_TORCH_DTYPES = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class _Absent(type):
    """A name without a stand-in: good for annotations and comparisons, an error when it is called."""

    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} has no stand-in in tests/te")

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _Absent(f"{cls.__name__}.{name}", (), {}))
        return getattr(cls, name)

    def __int__(cls):
        return 0


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    globals()[name] = _Absent(name, (), {})
    return globals()[name]


# Their members are only compared with each other.
NVTE_QKV_Format, NVTE_QKV_Layout, NVTE_Mask_Type, NVTE_Bias_Type = (
    __getattr__(name) for name in ("NVTE_QKV_Format", "NVTE_QKV_Layout", "NVTE_Mask_Type", "NVTE_Bias_Type")
)

# Looked up through a star import, which does not ask `__getattr__`.
layernorm_fwd, layernorm_bwd = (__getattr__(name) for name in ("layernorm_fwd", "layernorm_bwd"))


def _counted(function):
    def call(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def get_cudnn_version():
    """cuDNN 9.18.1, as cudnnGetVersion() encodes it."""
    return 91801


def get_cublasLt_version():
    """cuBLAS 13.1."""
    return 130100


@_counted
def generic_gemm(
    a, transa, b, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace,
    workspace_size, accumulate, split_accumulator, *, comm_overlap, comm_type, extra_output, bulk_overlap, alpha, beta,
):  # fmt: skip
    """op(b) @ op(a), in row-major terms; with `grad`, `bias` asks for the sum over the rows of b."""
    assert not gelu and quantizer is None and comm_overlap is None and extra_output is None
    assert a.dtype == b.dtype, f"cuBLAS: {a.dtype} x {b.dtype}"
    assert a.is_contiguous() and b.is_contiguous()
    rows = b.reshape(-1, b.shape[-1])
    left = rows.t() if transb else rows
    matrix = a.reshape(-1, a.shape[-1])
    product = left.float() @ (matrix.t() if transa else matrix).float() * alpha
    bias_gradient = None
    if bias is not None:
        assert bias.dtype == _TORCH_DTYPES[DType(int(bias_dtype))]
        if grad:
            bias_gradient = rows.float().sum(0).to(bias.dtype)
        else:
            product = product + bias.float()
    if out is None:
        assert not accumulate
        dtype = a.dtype if out_dtype is None else _TORCH_DTYPES[DType(int(out_dtype))]
        out = product.to(dtype)
        out = out if transb else out.view(*b.shape[:-1], -1)
    else:
        assert out.numel() == product.numel(), f"{tuple(out.shape)} for {tuple(product.shape)}"
        product = product.view(out.shape)
        out.copy_(out.float() * beta + product if accumulate else product)
    return out, bias_gradient, None, None


@_counted
def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """(y, None, 1 / rms [rows] fp32)."""
    assert quantizer is None and not zero_centered_gamma and x.dim() == 2
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    y = (x.float() * rsigma[:, None] * weight.float()).to(_TORCH_DTYPES[DType(int(out_dtype))])
    return (y if out is None else out.copy_(y)), None, rsigma


@_counted
def rmsnorm_bwd(dy, x, rsigma, weight, sm_margin, zero_centered_gamma):
    """(dx, dweight)."""
    assert dy.shape == x.shape and not zero_centered_gamma
    normed = x.float() * rsigma[:, None]
    scaled = dy.float() * weight.float()
    dx = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def _rotate(t, freqs, start_positions, layout, interleaved, cu_seqlens, cp_size, cp_rank, *, direction):
    assert layout is NVTE_QKV_Format.NVTE_THD and not interleaved and cp_size == 1
    assert start_positions is None and freqs.dtype == torch.float32 and cu_seqlens.dtype == torch.int32
    assert t.dim() == 3 and int(cu_seqlens[-1]) == t.shape[0], "the last boundary is the number of tokens"
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1])
    angles = freqs.reshape(freqs.shape[0], 1, -1)[torch.arange(t.shape[0]) - starts]
    width = angles.shape[-1]
    turned, rest = t[..., :width].float(), t[..., width:]
    first, second = turned.chunk(2, dim=-1)
    quarter = torch.cat((-second, first), dim=-1) * direction
    return torch.cat(((turned * angles.cos() + quarter * angles.sin()).to(t.dtype), rest), dim=-1)


@_counted
def fused_rope_forward(*args):
    """Rotary embedding of t [tokens, heads, head_dim], positions counted from each sequence's start."""
    return _rotate(*args, direction=1)


@_counted
def fused_rope_backward(*args):
    """The rotation back."""
    return _rotate(*args, direction=-1)


def get_fused_attn_backend(parameters):
    """(backend, why not): cuDNN's arbitrary-length kernel for 16-bit types."""
    half = {int(DType.kFloat16), int(DType.kBFloat16)}
    if int(parameters.qkv_dtype) not in half:
        return NVTE_Fused_Attn_Backend.NVTE_No_Backend, f"qkv_dtype {parameters.qkv_dtype}"
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def _packed_attention(q, k, v, cu_seqlens, scale):
    group = q.shape[1] // k.shape[1]
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        one = q[start:end].transpose(0, 1)
        keys, values = (x[start:end].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        length = end - start
        mask = torch.full((length, length), -math.inf).triu(1)
        outputs.append(
            (torch.softmax(one @ keys.transpose(1, 2) * scale + mask, -1) @ values).transpose(0, 1)
        )
    return torch.cat(outputs)


@_counted
def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, scale, dropout, fast_zero_fill, layout, out_format, scale_format,
    bias_type, mask_type, softmax_type, window, bottom_right, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
    cu_seqlens_q_padded, cu_seqlens_kv_padded, *rest,
):  # fmt: skip
    """[out, softmax statistics, generator state]."""
    assert layout is NVTE_QKV_Layout.NVTE_THD_THD_THD
    assert mask_type is NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK
    assert bias_type is NVTE_Bias_Type.NVTE_NO_BIAS
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert dropout == 0.0 and tuple(window) == (-1, 0) and torch.equal(cu_seqlens_q, cu_seqlens_kv)
    lengths = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    assert isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_kv >= int(lengths.max())
    assert torch.equal(cu_seqlens_q_padded, cu_seqlens_q) and int(cu_seqlens_q[-1]) == q.shape[0]
    out = _packed_attention(q.float(), k.float(), v.float(), cu_seqlens_q, scale).to(q.dtype)
    return [out, q.new_empty(0, dtype=torch.float32), torch.zeros(2, dtype=torch.int64)]


@_counted
def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, scale, dropout, fast_zero_fill, layout, out_format, grad_format, grad_layout,
    scale_format, grad_scale_format, bias_type, mask_type, softmax_type, window, bottom_right, deterministic,
    cu_seqlens_q, cu_seqlens_kv, q, k, v, out, grad_out, *rest,
):  # fmt: skip
    """[dq, dk, dv, no bias gradient, no offset gradient]."""
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
        recomputed = _packed_attention(*leaves, cu_seqlens_q, scale)
    gradients = torch.autograd.grad(recomputed, leaves, grad_out.float().view_as(recomputed))
    return [*(g.to(x.dtype) for g, x in zip(gradients, (q, k, v))), None, None]


@_counted
def convert_thd_to_bshd(packed, cu_seqlens, batch, width):
    """[tokens, heads, head_dim] to [batch, width, heads, head_dim], right-padded."""
    padded = packed.new_zeros(batch, width, *packed.shape[1:])
    bounds = cu_seqlens.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        padded[row, : end - start] = packed[start:end]
    return padded


@_counted
def convert_bshd_to_thd(padded, cu_seqlens, tokens):
    """The way back."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    packed = torch.cat([padded[row, :length] for row, length in enumerate(lengths)])
    assert packed.shape[0] == tokens
    return packed


@_counted
def multi_tensor_adam(
    chunk, noop, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, *rest
):
    """AdamW on fp32 lists [gradients, parameters, first moments, second moments], in place."""
    assert not rest and len(lists) == 4 and mode == 1
    assert not int(noop)
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, average, square in zip(*lists):
        assert gradient.dtype == parameter.dtype == average.dtype == square.dtype == torch.float32
        average.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (average / first) / ((square / second).sqrt() + epsilon) + weight_decay * parameter
        parameter.sub_(update, alpha=float(lr))


@_counted
def multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    """(norm [1] fp32, None)."""
    assert not per_tensor
    return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None


@_counted
def multi_tensor_scale(chunk, noop, lists, factor):
    """lists[1] = lists[0] * factor."""
    for source, target in zip(*lists):
        target.copy_(source * factor)


@_counted
def multi_tensor_scale_tensor(chunk, noop, lists, factor):
    """The same with a factor [1] on the device."""
    multi_tensor_scale(chunk, noop, lists, factor)

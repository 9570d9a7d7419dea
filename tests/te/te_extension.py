"""A stand-in for `transformer_engine_torch`, Transformer Engine's compiled extension: its calls in torch's arithmetic.

It has the kernels that a dense model in bf16 or fp32 needs, with the arguments, shapes and dtypes of version 2.20, and
computes in fp32 as the kernels do. It refuses what the real kernels refuse where the refusal depends on the caller
(dtypes, packing, masks). Any other name exists, so that the Python classes can be imported and mention it, and raises
when it is called. `calls` counts what was called.
"""

import collections
import enum
import itertools

import te_attention
import te_fp8
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
    kinds = {type(t).__name__ for t in (a, b)}
    calls[f"generic_gemm of {' and '.join(sorted(kinds))}"] += 1
    fallback = a.dtype if isinstance(a, torch.Tensor) else None
    a = te_fp8.operand(a, "rowwise" if transa else "columnwise")
    b = te_fp8.operand(b, "columnwise" if transb else "rowwise")
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
        dtype = fallback if out_dtype is None else _TORCH_DTYPES[DType(int(out_dtype))]
        out = product.to(dtype)
        out = out if transb else out.view(*b.shape[:-1], -1)
    else:
        assert out.numel() == product.numel(), f"{tuple(out.shape)} for {tuple(product.shape)}"
        product = product.view(out.shape)
        out.copy_(out.float() * beta + product if accumulate else product)
    return out, bias_gradient, None, None


quantize, bgrad_quantize, split_quantize, fp8_transpose = map(
    _counted, (te_fp8.quantize, te_fp8.bgrad_quantize, te_fp8.split_quantize, te_fp8.fp8_transpose)
)

fused_multi_row_padding, fused_multi_row_unpadding = map(
    _counted, (te_fp8.fused_multi_row_padding, te_fp8.fused_multi_row_unpadding)
)
create_empty_quantized_tensor = te_fp8.create_empty_quantized_tensor


def get_num_cublas_streams():
    """One: products run one after the other."""
    return 1


@_counted
def te_general_grouped_gemm(
    a, transa, b, transb, out, out_dtype, m_splits, bias, bias_dtype, single_output, pre_gelu, grad, workspaces,
    workspace_size, accumulate, split_accumulator, sm_count,
):  # fmt: skip
    """`generic_gemm` for each expert; of one without tokens nothing is written but a gradient of zeros."""
    parts = out[0].split(m_splits) if single_output else out
    for one, other, part in zip(a, b, parts, strict=True):
        names = " and ".join(sorted({type(one).__name__, type(other).__name__}))
        calls[f"grouped gemm of {names}"] += 1
        if other.size().numel() == 0:
            if transb and not accumulate:
                part.zero_()
            continue
        generic_gemm(
            one, transa, other, transb, part, None, None, None, None, False, None, grad, None, 0, accumulate,
            split_accumulator, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
            alpha=1.0, beta=1.0,
        )  # fmt: skip
    return bias


@_counted
def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """(y, None, 1 / rms [rows] fp32)."""
    assert not zero_centered_gamma and x.dim() == 2
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    y = (x.float() * rsigma[:, None] * weight.float()).to(_TORCH_DTYPES[DType(int(out_dtype))])
    if quantizer is not None:
        return te_fp8.quantize(y, quantizer, out), None, rsigma
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
    assert layout is NVTE_QKV_Format.NVTE_THD and not interleaved
    assert start_positions is None and freqs.dtype == torch.float32 and cu_seqlens.dtype == torch.int32
    assert t.dim() == 3 and int(cu_seqlens[-1]) == t.shape[0] * cp_size, (
        "the last boundary: all ranks' tokens"
    )
    # Of a whole sequence a rank has its chunks `cp_rank` and 2 cp_size - 1 - cp_rank.
    lengths = cu_seqlens.diff().tolist()
    assert cp_size == 1 or not any(length % (2 * cp_size) for length in lengths)
    assert freqs.shape[0] >= max(lengths)
    places = []
    for length in filter(None, lengths):
        chunks = torch.arange(length).chunk(2 * cp_size)
        places += [chunks[cp_rank], chunks[-1 - cp_rank]] if cp_size > 1 else chunks
    angles = freqs.reshape(freqs.shape[0], 1, -1)[torch.cat(places)]
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


@_counted
def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, scale, dropout, fast_zero_fill, layout, out_format, scale_format,
    bias_type, mask_type, softmax_type, window, bottom_right, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
    cu_seqlens_q_padded, cu_seqlens_kv_padded, *rest,
):  # fmt: skip
    """[out, log-sum-exp [tokens, heads, 1] fp32, generator state]."""
    assert layout is NVTE_QKV_Layout.NVTE_THD_THD_THD and bias_type is NVTE_Bias_Type.NVTE_NO_BIAS
    assert q.dtype == k.dtype == v.dtype and q.dtype in te_attention.dtypes
    # A ring says nothing of the window, which is the whole sequence then.
    causal = _is_causal(mask_type)
    assert dropout == 0.0 and tuple(window) in ((-1, 0), (-1, -1)) and (causal or tuple(window) == (-1, -1))
    for x, bounds, padded, longest in (
        (q, cu_seqlens_q, cu_seqlens_q_padded, max_seqlen_q),
        (k, cu_seqlens_kv, cu_seqlens_kv_padded, max_seqlen_kv),
    ):
        assert x.is_contiguous() and bounds.dtype == torch.int32 and int(padded[-1]) == x.shape[0]
        assert (
            torch.equal(padded, bounds) and isinstance(longest, int) and longest >= int(bounds.diff().max())
        )
    out, lse = te_attention.packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_kv, scale, causal)
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


@_counted
def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, scale, dropout, fast_zero_fill, layout, out_format, grad_format, grad_layout,
    scale_format, grad_scale_format, bias_type, mask_type, softmax_type, window, bottom_right, deterministic,
    cu_seqlens_q, cu_seqlens_kv, q, k, v, out, grad_out, fake_dtype, saved, *rest,
):  # fmt: skip
    """[dq, dk, dv, no bias gradient, no offset gradient]; saved: the forward's statistics."""
    assert grad_out.dtype == q.dtype and grad_out.is_contiguous() and saved[0].shape == (*q.shape[:2], 1)
    gradients = te_attention.packed_backward(
        q, k, v, out.view_as(q), grad_out.view_as(q), saved[0], cu_seqlens_q, cu_seqlens_kv, scale,
        _is_causal(mask_type),
    )  # fmt: skip
    return [*gradients, None, None]


def _is_causal(mask_type):
    assert mask_type in (NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK, NVTE_Mask_Type.NVTE_PADDING_MASK)
    return mask_type is NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK


thd_read_half_tensor = _counted(te_attention.thd_read_half_tensor)
thd_read_second_half_lse = _counted(te_attention.thd_read_second_half_lse)
thd_second_half_lse_correction = _counted(te_attention.thd_second_half_lse_correction)
thd_out_correction = _counted(te_attention.thd_out_correction)
thd_grad_correction = _counted(te_attention.thd_grad_correction)


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
    """AdamW on lists [gradients, parameters, first moments, second moments, and perhaps main weights], in place.

    Without main weights all is fp32; with them gradients are bf16 or fp32, parameters bf16, moments of one dtype.
    """
    assert not rest and len(lists) in (4, 5) and mode == 1
    assert not int(noop)
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, average, square, *main in zip(*lists):
        assert average.dtype == square.dtype
        if main:
            assert main[0].dtype == torch.float32 and parameter.dtype == torch.bfloat16
        else:
            assert gradient.dtype == parameter.dtype == average.dtype == torch.float32
        g, m, v, p = (t.float() for t in (gradient, average, square, main[0] if main else parameter))
        m = m.mul(beta1).add(g, alpha=1 - beta1)
        v = v.mul(beta2).addcmul(g, g, value=1 - beta2)
        updated = p - float(lr) * ((m / first) / ((v / second).sqrt() + epsilon) + weight_decay * p)
        for target, value in zip((parameter, average, square, *main), (updated, m, v, updated)):
            target.copy_(value)


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

"""FP8 for the stand-in extension: casts with a scale for each block or tensor, and what a product reads of the result.

Written from the formats that Transformer Engine's Python classes describe: 1 x 128 blocks with their scales transposed,
128 x 128 blocks, one scale a tensor; column-wise data is transposed. The casts are torch's own, to the nearest value.
"""

import torch

_BLOCK = 128


def _maximum(dtype):
    return torch.finfo(dtype).max


def _torch_dtype(quantizer):
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[quantizer.dtype]


def quantize(tensor, quantizer, output=None, noop=None):
    """`tensor` in the quantizer's format, into `output` if there is one."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    assert noop is None and tensor.is_contiguous()
    if output is None:
        output = create_empty_quantized_tensor(
            quantizer, list(tensor.shape), tensor.dtype, tensor.device, False
        )
    flat = tensor.detach().float().reshape(-1, tensor.shape[-1])
    if isinstance(quantizer, Float8BlockQuantizer):
        _quantize_blocks(flat, quantizer, output)
    else:
        _quantize_whole(flat, quantizer, output)
    return output


def bgrad_quantize(gradient, quantizer):
    """(the bias's gradient, the quantized gradient)."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    return rows.float().sum(0).to(gradient.dtype), quantize(gradient.contiguous(), quantizer)


def split_quantize(tensor, splits, quantizers, **settings):
    """Each expert's rows."""
    return [
        quantize(part.contiguous(), quantizer)
        for part, quantizer in zip(tensor.split(list(splits)), quantizers, strict=True)
    ]


def fp8_transpose(data, dtype, *, out=None):
    """[..., columns] to [columns, ...]."""
    turned = data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])
    return turned if out is None else out.copy_(turned)


def operand(tensor, usage):
    """What a product reads of an operand: fp32, in the logical shape, from the data of one direction only."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    if not isinstance(tensor, QuantizedTensorStorage):
        return tensor
    data = tensor.get_metadata()
    if isinstance(tensor, Float8BlockwiseQTensorStorage):
        other = "columnwise" if usage == "rowwise" else "rowwise"
        data |= {f"{other}_data": None, f"{other}_scale_inv": None}
        assert data[f"{usage}_data"] is not None, f"a product without {usage} data"
        width = (
            data[f"{usage}_data"].shape[-1]
            if usage == "rowwise"
            else tensor.size().numel() // tensor.size(-1)
        )
        assert not width % 16, f"cuBLAS: rows of whole 16 bytes, not {width}"
        return Float8BlockwiseQTensorStorage(**data).dequantize(dtype=torch.float32)
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    dtype = TE_DType_To_Torch[tensor._fp8_dtype]
    if usage == "rowwise":
        assert tensor._data is not None, "a product without rowwise data"
        return tensor._data.view(dtype).float() * tensor._scale_inv
    assert tensor._transpose is not None and not tensor._transpose_invalid, (
        "a product without columnwise data"
    )
    turned = tensor._transpose.view(dtype).float() * tensor._scale_inv
    return turned.reshape(turned.shape[0], -1).t().reshape(*turned.shape[1:], turned.shape[0]).contiguous()


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory):
    """The quantizer's tensor class with data that somebody will write."""
    shape = tuple(shape)
    meta = quantizer.storage_metadata(dtype)
    data = {
        name.removeprefix("_"): torch.zeros(size, dtype=kind)
        for name, (size, kind) in quantizer.inner_tensor_specs(shape).items()
    }
    if meta["cls"].__name__.startswith("Float8Tensor"):
        data = {"fp8_scale_inv" if name == "scale_inv" else name: value for name, value in data.items()}
        data = {"data": None, "data_transpose": None} | {
            {"transpose": "data_transpose"}.get(name, name): value for name, value in data.items()
        }
    else:
        names = [f"{way}wise_{what}" for way in ("row", "column") for what in ("data", "scale_inv")]
        data = dict.fromkeys(names) | data
    if not quantizer.internal:
        data |= {"shape": shape, "dtype": dtype}
        meta["nontensor_kwargs"].pop("fake_dtype")
    return meta["cls"](**data, **meta["nontensor_kwargs"])


def _scale_inv(amax, quantizer):
    """The factor back: amax / largest value, to a power of two (rounded up) where the recipe says so."""
    limit = _maximum(_torch_dtype(quantizer))
    scale = limit / amax.clamp(min=max(quantizer.amax_epsilon, torch.finfo(torch.float32).tiny))
    scale = torch.where((amax == 0) | scale.isinf(), torch.ones_like(scale), scale)
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(scale.log2().floor())
    return 1 / scale


def _cast(values, quantizer):
    limit = _maximum(_torch_dtype(quantizer))
    return values.clamp(-limit, limit).to(_torch_dtype(quantizer)).view(torch.uint8)


def _quantize_whole(flat, quantizer, output):
    amax = flat.abs().max() if flat.numel() else flat.new_zeros(())
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            amax, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
        )
    inverse = _scale_inv(amax, quantizer)
    data = _cast(flat / inverse, quantizer)
    output._scale_inv.copy_(inverse)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(data.t().reshape(output._transpose.shape))
        output._transpose_invalid = False


def _quantize_blocks(flat, quantizer, output):
    for data, scales, values in (
        (output._rowwise_data, output._rowwise_scale_inv, flat),
        (output._columnwise_data, output._columnwise_scale_inv, flat.t()),
    ):
        if data is None or not data.numel():  # an expert without tokens
            continue
        rows, columns = values.shape
        high = _BLOCK if quantizer.block_scaling_dim == 2 else 1
        padded = torch.nn.functional.pad(values, (0, -columns % _BLOCK, 0, -rows % high))
        blocks = padded.reshape(padded.shape[0] // high, high, -1, _BLOCK)
        inverse = _scale_inv(blocks.abs().amax(dim=(1, 3)), quantizer)
        cast = _cast(blocks / inverse[:, None, :, None], quantizer)
        data.copy_(cast.reshape(padded.shape)[:rows, :columns].reshape(data.shape))
        if quantizer.block_scaling_dim == 1:
            inverse = inverse.t()
        scales.zero_()
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse


def fused_multi_row_padding(source, target, rows, padded_rows):
    """Each expert's rows, and zeros up to its padded number."""
    parts = zip(source.split(list(rows)), target.split(list(padded_rows)), strict=True)
    for part, padded in parts:
        padded.zero_()
        padded[: len(part)] = part


def fused_multi_row_unpadding(source, target, padded_rows, rows):
    """The way back."""
    parts = zip(source.split(list(padded_rows)), target.split(list(rows)), strict=True)
    for padded, part in parts:
        part.copy_(padded[: len(part)])

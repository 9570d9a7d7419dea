"""The weight stream as servers hold it: in their dtype, and matrices in FP8 with one scale for each block of 128 x 128.

Why the trainer quantizes and not the servers: `config/model_folder/quantized.py`. The format is that of DeepSeek-V3
(arXiv:2412.19437, section 3.3) and of the folders of FP8 weights that SGLang loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_laser.config.model_folder.quantized import BLOCK, SCALE_SUFFIX, is_quantized

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST = 1e-12  # of a block's largest magnitude, so that zeros have a scale


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8: codes x scales is nearest to it, and the largest magnitude of each block has the code 448.

    Blocks at the end of rows or columns may be smaller. Takes two float32 copies of the matrix for a moment.

    Args:
        weight: [rows, columns], any float.

    Returns:
        codes: [rows, columns] float8_e4m3fn, rounded to nearest even.
        scales: [ceil(rows / 128), ceil(columns / 128)] float32.
    """
    rows, columns = weight.shape
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(weight.detach().float(), padding)
    # [blocks of rows, 128, blocks of columns, 128]
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=_SMALLEST) / LARGEST
    # A quotient may be past 448 by its own rounding.
    quotients = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST)
    codes = quotients.view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return codes.contiguous(), scales


def as_served(
    weights: Iterable[tuple[str, torch.Tensor]], *, dtype: torch.dtype, quantized: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream of Hugging Face names and tensors, each in the dtype that it travels and is held in.

    Matrices are quantized from `dtype`, which are the weights that the trainer computes with.

    Args:
        dtype: the servers' dtype.
        quantized: with FP8 matrices, each followed by its scales.
    """
    for name, tensor in weights:
        plain = tensor.detach().to(dtype)
        if quantized and is_quantized(name):
            codes, scales = quantize_blocks(plain)
            yield name, codes
            yield name + SCALE_SUFFIX, scales
        else:
            yield name, plain

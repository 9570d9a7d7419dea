"""How the in-process engine draws a token, from all tokens or from a set of which it keeps a record."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from megatron_laser.types import SamplingParams, TokenSets

_DRAW_BLOCK = 256


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index [rows] of each row [rows, vocab] of probabilities, which need not be normalised."""
    if probabilities.is_cuda:
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    # multinomial draws a number for every entry, which on a CPU takes a fifth of a small model's decoding. Here are two
    # a row: for a block of entries, and for one of its own.
    rows, vocab = probabilities.shape
    blocks = F.pad(probabilities, (0, -vocab % _DRAW_BLOCK)).view(rows, -1, _DRAW_BLOCK)
    block = _pick(blocks.sum(dim=-1, dtype=torch.float64), generator)
    inside = blocks[torch.arange(rows), block].double()
    return block * _DRAW_BLOCK + _pick(inside, generator)


def _pick(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index [rows] in proportion to weights [rows, entries] in float64, never one of weight 0."""
    below = weights.cumsum(dim=-1)
    total = below[:, -1:]
    if not bool(((total > 0) & total.isfinite()).all()):
        raise ValueError(
            "next-token probabilities are not finite, or all 0: the weights overflow, or hold NaN"
        )
    drawn = torch.rand(total.shape, dtype=total.dtype, generator=generator) * total
    drawn = torch.minimum(
        drawn, torch.nextafter(total, torch.zeros_like(total))
    )  # a product can round up to the total
    return torch.searchsorted(below, drawn, right=True).squeeze(1)


def narrowed(probabilities: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities [rows, vocab] with 0 for what `top_p` and `min_p` leave out (unnormalised)."""
    if sampling.top_p < 1.0:
        probabilities = _nucleus(probabilities, sampling.top_p)
    if sampling.min_p > 0.0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of tokens whose probabilities reach `top_p` (unnormalised)."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(outside, 0.0))


class SetRecord:
    """Draws from the `top_k` most probable tokens, and keeps the set that each token was drawn from.

    The filters are applied as SGLang's sampler in torch does (0.5.23, `top_k_top_p_min_p_sampling_from_probs_torch`):
    `top_p` counts probabilities of the whole vocabulary, and `min_p` compares with the most probable token.
    """

    def __init__(self, rows: int) -> None:
        """`rows`: of the batch at its beginning, by which they are known later."""
        self._rows = rows
        self._steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]] = []

    def sample(
        self,
        logprobs: torch.Tensor,
        sampling: SamplingParams,
        generator: torch.Generator,
        running: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token [rows] and its log-prob [rows] among those that it was drawn from.

        logprobs: [rows, vocab] of logits / temperature. running: which rows these are [rows], and of which the token
        counts [rows] bool.
        """
        assert sampling.top_k is not None
        most = 1 if sampling.temperature == 0.0 else sampling.top_k
        values, ids = logprobs.topk(min(most, logprobs.shape[1]), dim=-1)
        probabilities = values.exp()
        inside = probabilities >= sampling.min_p * probabilities[:, :1]
        if sampling.top_p < 1.0:
            inside &= probabilities.cumsum(dim=-1) - probabilities < sampling.top_p
        inside[:, 0] = True  # whatever is NaN is refused below
        among = values.masked_fill(~inside, -math.inf).log_softmax(dim=-1)
        place = draw(among.exp(), generator)[:, None]
        rows, counts = running
        self._note(rows[counts], inside[counts], ids[counts])
        return ids.gather(1, place).squeeze(1), among.gather(1, place).squeeze(1)

    def _note(self, rows: torch.Tensor, inside: torch.Tensor, ids: torch.Tensor) -> None:
        ends = inside.sum(dim=1).cumsum(dim=0)
        bounds = torch.zeros(self._rows, 2, dtype=torch.int64, device=rows.device)
        bounds[rows, 0] = torch.cat([ends.new_zeros(1), ends[:-1]])
        bounds[rows, 1] = ends
        self._steps.append((bounds.cpu().numpy(), ids[inside].int().cpu().numpy()))

    def of(self, row: int, tokens: int) -> TokenSets:
        """Of a row's first tokens."""
        parts = [ids[slice(*bounds[row])] for bounds, ids in self._steps[:tokens]]
        counts = np.array([len(part) for part in parts], np.int32)
        return TokenSets(counts, np.concatenate([np.zeros(0, np.int32), *parts]))

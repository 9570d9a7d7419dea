"""Tokens drawn from probabilities: as often as they are probable, and never from what is none."""

import math

import pytest
import torch

from megatron_laser.rollout.drawing import draw


@pytest.mark.parametrize("vocab", [7, 256, 600])
def test_tokens_are_drawn_as_often_as_they_are_probable(vocab):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(vocab, generator=generator).square()
    weights[::3] = 0.0  # as outside of a nucleus
    weights[-1] = 0.0
    draws = 200_000
    drawn = draw(weights.expand(draws, vocab), generator)
    counts = torch.bincount(drawn, minlength=vocab).double()
    assert counts[weights == 0].sum() == 0
    expected = draws * (weights / weights.sum()).double()
    possible = weights > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_tokens_rarer_than_a_step_of_float32_are_drawn_too(monkeypatch):
    weights = torch.tensor([[1.0, 0.0, 2.0**-30]])  # 1 + 2^-30 is 1 in float32
    for drawn, token in ((1 - 2.0**-31, 2), (1 - 2.0**-29, 0), (0.0, 0), (1 - 2.0**-53, 2)):
        monkeypatch.setattr(
            torch, "rand", lambda shape, drawn=drawn, **_: torch.full(shape, drawn, dtype=torch.float64)
        )
        assert draw(weights, torch.Generator()).tolist() == [token]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_probabilities_that_are_none_are_said_to_be_so(broken):
    with pytest.raises(ValueError, match="not finite, or all 0"):
        draw(torch.tensor([[0.5, 0.5], [broken, 0.0]]), torch.Generator())

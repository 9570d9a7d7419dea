"""The GPU tests' tolerance and problems, as far as a CPU can check them: an accumulator that cuts off, one row."""

import pytest
import torch
from helpers.logprob import inputs, largest_logit, reference, tensor_core_tolerance

from megatron_laser.ops import IGNORE_LABEL


def cut_off(value):
    """float64 to float32, towards 0."""
    nearest = value.float()
    return torch.where(
        nearest.abs() > value.abs(), torch.nextafter(nearest, torch.zeros_like(nearest)), nearest
    )


def tensor_core_product(hidden, weight):
    """[rows, columns] float32: 16 exact products at a time are added to a sum that is cut off."""
    total = torch.zeros(hidden.shape[0], weight.shape[0])
    for x, w in zip(hidden.double().split(16, 1), weight.double().split(16, 1)):
        total = cut_off(total.double() + x @ w.T)
    return total


@pytest.mark.parametrize("hidden_size", [64, 1536, 5120])
def test_the_tolerance_covers_an_accumulator_that_cuts_off(hidden_size):
    hidden, weight, labels = inputs(64, hidden_size, 100, torch.bfloat16, scale=hidden_size**-0.5 * 4)
    log_p = torch.log_softmax(tensor_core_product(hidden, weight).double(), 1)
    labelled = labels != IGNORE_LABEL
    error = (
        log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) - reference(hidden, weight, labels)[0]
    )
    worst = error[labelled].abs().max().item()
    tolerance = tensor_core_tolerance(largest_logit(hidden, weight), hidden_size)
    assert worst <= tolerance / 2  # room for another order of additions
    if hidden_size == 5120:
        assert worst > 2e-5 + 1e-6 * largest_logit(hidden, weight)  # what rounding to nearest would allow
        assert tolerance < 2e-3  # bf16 logits would be off by far more


@pytest.mark.parametrize("columns", [512, 4096, 33792])
def test_sums_over_kept_columns_lose_less_to_the_accumulator_than_to_bfloat16(columns):
    """dX = P W of one kept tile: `columns` terms, of one sign as a bad case, cut off after every 16."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, columns, generator=generator).bfloat16()
    weight = (torch.rand(8, columns, generator=generator) + 0.5).bfloat16()
    exact = values.double() @ weight.double().T
    lost = ((exact - tensor_core_product(values, weight).double()) / exact).max().item()
    assert 0 < lost <= columns / 16 * 2**-23 < 2**-9 / 4


def test_a_problem_of_one_row_has_a_label():
    _, _, labels = inputs(rows=1)
    assert labels[0] != IGNORE_LABEL
    _, _, labels = inputs(rows=6)
    assert (labels == IGNORE_LABEL).tolist() == [True, False, False, False, False, True]

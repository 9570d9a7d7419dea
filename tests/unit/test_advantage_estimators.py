"""The verifier's advantages by each estimator, against plain loops, and under the mixture with the scores."""

import math
from statistics import fmean, stdev
from typing import get_args

import pytest
import torch

from megatron_laser.algorithms.advantages import ESTIMATORS as TABLE
from megatron_laser.algorithms.advantages import (
    mix_advantages,
    reinforce_pp_advantages,
    rloo_advantages,
    self_reward_advantages,
    verifier_advantages,
)
from megatron_laser.config.schema.training import PolicyConfig

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp")


def reference(estimator, rewards, group_ids):
    members = {g: [r for r, own in zip(rewards, group_ids) if own == g] for g in group_ids}
    result = []
    for reward, group in zip(rewards, group_ids):
        own = members[group]
        spread = stdev(own) if len(own) > 1 else 0.0
        if estimator == "grpo":
            result.append((reward - fmean(own)) / (spread + 1e-6))
        elif estimator == "rloo":
            rest = (math.fsum(own) - reward) / (len(own) - 1) if len(own) > 1 else reward
            result.append(reward - rest)
        else:
            result.append(reward - fmean(own))
    if estimator == "reinforce_pp":
        return [(value - fmean(result)) / (stdev(result) + 1e-6) for value in result]
    return result


def ragged(seed, sizes=(1, 2, 3, 5, 8, 4)):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.full((size,), 90 - 7 * size) for size in sizes])
    ids = ids[torch.randperm(len(ids), generator=generator)]
    return torch.rand(len(ids), generator=generator, dtype=torch.float64), ids


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_are_the_formula_for_any_order_and_group_sizes(estimator, seed):
    rewards, ids = ragged(seed)
    result = verifier_advantages(rewards, ids, estimator=estimator)
    expected = torch.tensor(reference(estimator, rewards.tolist(), ids.tolist()))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", [1.5, -0.5, -0.5, -0.5]),  # mean 1/4, std 1/2
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),  # the others' means: 0, and 1/3 three times
        ("reinforce_pp", [1.5, -0.5, -0.5, -0.5]),  # one group is the batch
    ],
)
def test_one_right_answer_of_four_by_hand(estimator, expected):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    result = verifier_advantages(rewards, torch.zeros(4, dtype=torch.long), estimator=estimator)
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_in_every_group_give_zero(estimator):
    # Ten times 0.1 does not add up to 1 in float64.
    rewards = torch.tensor([0.1] * 10 + [0.7] * 3, dtype=torch.float64)
    result = verifier_advantages(rewards, torch.tensor([5] * 10 + [2] * 3), estimator=estimator)
    assert torch.equal(result, torch.zeros(13))


def test_reinforce_pp_weighs_groups_by_their_spread_where_grpo_makes_them_alike():
    rewards = torch.tensor([1.0, 0.0, 0.6, 0.4], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1])
    result = reinforce_pp_advantages(rewards, ids)
    assert float(result[0] / result[2]) == pytest.approx(5.0)
    assert float(result.double().std()) == pytest.approx(1.0, rel=1e-5)
    alike = verifier_advantages(rewards, ids, estimator="grpo")
    assert float(alike[0]) == pytest.approx(float(alike[2]), rel=1e-4)


def test_reinforce_pp_learns_from_groups_of_one():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    result = reinforce_pp_advantages(rewards, torch.arange(4))
    value = 0.5 / math.sqrt(1 / 3)
    torch.testing.assert_close(result, torch.tensor([value, -value, -value, value]), rtol=1e-5, atol=0)
    assert torch.equal(reinforce_pp_advantages(torch.full((4,), 0.3), torch.arange(4)), torch.zeros(4))
    assert torch.equal(rloo_advantages(rewards, torch.arange(4)), torch.zeros(4))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_mix_with_every_estimator_and_a_flat_group_keeps_its_verifier_advantage(estimator):
    """Group 0: scores 1, 0, 1/2, 1/2 (std sqrt(1/6)); group 1: scores within the threshold."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    scores = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.52, 0.5, 0.5])
    ids = torch.tensor([0] * 4 + [1] * 4)
    verifier = verifier_advantages(rewards, ids, estimator=estimator)
    own = self_reward_advantages(scores, torch.ones(8, dtype=torch.bool), ids, verifier, std_threshold=0.1)
    mixed = mix_advantages(verifier, own, tau=0.1)
    unit = 0.5 / math.sqrt(1 / 6)
    torch.testing.assert_close(own[:4], torch.tensor([unit, -unit, 0.0, 0.0]))
    torch.testing.assert_close(mixed[:4], 0.9 * verifier[:4] + 0.1 * own[:4])
    assert torch.equal(mixed[4:], verifier[4:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_has_no_advantages_and_an_ungraded_sample_is_refused(estimator):
    assert verifier_advantages(
        torch.zeros(0), torch.zeros(0, dtype=torch.long), estimator=estimator
    ).shape == (0,)
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan.*grade every sample"):
        verifier_advantages(
            torch.tensor([1.0, math.nan]), torch.zeros(2, dtype=torch.long), estimator=estimator
        )


def test_the_setting_and_the_table_name_the_same_estimators():
    assert (
        get_args(get_args(PolicyConfig.model_fields["advantage"].annotation)[0]) == tuple(TABLE) == ESTIMATORS
    )


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match=r"policy\.advantage is 'gae'; expected grpo, dr_grpo, rloo"):
        verifier_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), estimator="gae")

"""Group-relative advantages of rewards and self-reward scores, and their mixture."""

import math

import pytest
import torch

from megatron_laser.algorithms.advantages import (
    groups_mixed,
    groups_uniform,
    grpo_advantages,
    mix_advantages,
    self_reward_advantages,
)
from megatron_laser.algorithms.self_reward import self_reward_scores


def mean_and_std(values):
    """Mean and unbiased std as plain loops; std 0 below two values."""
    mean = math.fsum(values) / len(values) if values else 0.0
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def reference_grpo(rewards, group_ids, normalize_std=True):
    result = []
    for reward, group in zip(rewards, group_ids):
        mean, std = mean_and_std([r for r, g in zip(rewards, group_ids) if g == group])
        result.append((reward - mean) / (std + 1e-6 if normalize_std else 1.0))
    return result


def reference_self(scores, scored, group_ids, verifier, threshold, unscored):
    clamped = [min(max(s, 0.0), 1.0) if ok else 0.0 for s, ok in zip(scores, scored)]
    result = []
    for i, group in enumerate(group_ids):
        members = [
            clamped[j]
            for j in range(len(scores))
            if group_ids[j] == group and (scored[j] or unscored == "zero")
        ]
        mean, std = mean_and_std(members)
        own = (scored[i] or unscored == "zero") and std > threshold
        result.append((clamped[i] - mean) / std if own else verifier[i])
    return result


def ragged_batch(seed=0):
    """Groups of sizes 1 to 9 with ids out of order, samples shuffled, scores beyond [0, 1], some unscored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.full((size,), 1000 - 37 * size) for size in range(1, 10)])
    ids = ids[torch.randperm(ids.numel(), generator=generator)]
    rewards = (torch.rand(ids.numel(), generator=generator) < 0.4).float()
    scores = torch.randn(ids.numel(), generator=generator) * 0.6 + 0.5
    scored = torch.rand(ids.numel(), generator=generator) < 0.8
    scores[~scored] = math.nan
    return rewards, scores, scored, ids


@pytest.mark.parametrize("normalize_std", [True, False])
def test_grpo_advantages_are_the_formula_for_any_order_and_group_sizes(normalize_std):
    rewards, _, _, ids = ragged_batch()
    result = grpo_advantages(rewards, ids, normalize_std=normalize_std)
    expected = reference_grpo(rewards.tolist(), ids.tolist(), normalize_std)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_grpo_advantages_by_hand():
    # mean 1/4, std = sqrt((9/16 + 3/16) / 3) = 1/2
    result = grpo_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(result, torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=1e-5, atol=0)


def test_equal_rewards_and_single_samples_give_exactly_zero():
    # Ten times 0.1 does not add up to 1 in float64.
    rewards = torch.tensor([0.1] * 10 + [0.7] * 3 + [1.0], dtype=torch.float64)
    ids = torch.tensor([5] * 10 + [-2] * 3 + [9])
    assert torch.equal(grpo_advantages(rewards, ids), torch.zeros(14))
    assert torch.equal(grpo_advantages(rewards, ids, normalize_std=False), torch.zeros(14))
    assert groups_uniform(rewards, ids) == 1.0


def test_grpo_advantages_refuse_an_ungraded_sample():
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan.*grade every sample"):
        grpo_advantages(torch.tensor([1.0, math.nan]), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("unscored", ["zero", "exclude"])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("seed", [0, 1])
def test_self_reward_advantages_are_the_formula(unscored, threshold, seed):
    rewards, scores, scored, ids = ragged_batch(seed)
    verifier = grpo_advantages(rewards, ids)
    result = self_reward_advantages(scores, scored, ids, verifier, std_threshold=threshold, unscored=unscored)
    expected = reference_self(
        scores.double().tolist(), scored.tolist(), ids.tolist(), verifier.tolist(), threshold, unscored
    )
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_advantages_do_not_depend_on_the_order_of_the_samples():
    rewards, scores, scored, ids = ragged_batch()
    verifier = grpo_advantages(rewards, ids)
    result = self_reward_advantages(scores, scored, ids, verifier, std_threshold=0.1)
    shuffle = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(3))
    shuffled = self_reward_advantages(
        scores[shuffle], scored[shuffle], ids[shuffle], verifier[shuffle], std_threshold=0.1
    )
    torch.testing.assert_close(shuffled, result[shuffle])


def test_a_group_at_the_threshold_uses_the_verifiers_advantage():
    scores = torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5, 0.5], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    verifier = torch.arange(6.0)
    std = math.sqrt(0.125)
    scored = torch.ones(6, dtype=torch.bool)
    at = self_reward_advantages(scores, scored, ids, verifier, std_threshold=std)
    assert torch.equal(at, verifier)
    below = self_reward_advantages(scores, scored, ids, verifier, std_threshold=std - 1e-9)
    expected = torch.tensor([-math.sqrt(0.5), math.sqrt(0.5)] * 2 + [4.0, 5.0])
    torch.testing.assert_close(below, expected)


def test_equal_scores_use_the_verifiers_advantage_even_at_threshold_zero():
    scores = torch.full((10,), 0.1, dtype=torch.float64)
    verifier = torch.arange(10.0)
    ids = torch.zeros(10, dtype=torch.long)
    result = self_reward_advantages(
        scores, torch.ones(10, dtype=torch.bool), ids, verifier, std_threshold=0.0
    )
    assert torch.equal(result, verifier)


def test_unscored_responses_count_as_zero_or_are_left_out():
    scores = torch.tensor([1.0, 0.5, math.nan])
    scored = torch.tensor([True, True, False])
    ids = torch.zeros(3, dtype=torch.long)
    verifier = torch.tensor([1.0, -2.0, 3.0])
    zero = self_reward_advantages(scores, scored, ids, verifier, std_threshold=0.1)
    torch.testing.assert_close(zero, torch.tensor([1.0, 0.0, -1.0]))  # mean 1/2, std 1/2
    exclude = self_reward_advantages(
        scores, scored, ids, verifier, std_threshold=0.1, unscored="exclude"
    )  # mean 3/4, std sqrt(1/8)
    torch.testing.assert_close(exclude, torch.tensor([math.sqrt(0.5), -math.sqrt(0.5), 3.0]))


@pytest.mark.parametrize("unscored", ["zero", "exclude"])
def test_a_group_of_only_truncated_or_empty_responses_uses_the_verifiers_advantage(unscored):
    verifier = torch.tensor([0.5, -0.5])
    result = self_reward_advantages(
        torch.full((2,), math.nan),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.long),
        verifier,
        std_threshold=0.0,
        unscored=unscored,
    )
    assert torch.equal(result, verifier)


def test_released_defect_1_old_policy_pass_never_places_the_score_token():
    """The released old-policy pass reads, at the row after EOS, the next packed sample's first token.

    Such a token is far likelier than c_ref + 10 = -13 nats, so here every released score clamps to 1, the std
    is 0 and the group falls back to A_v: nothing is mixed. From the score token's log-probs -13, -23, -13,
    -18 the scores are 1, 0, 1, 1/2: mean 5/8, squared deviations 9/64, 25/64, 9/64, 1/64, std sqrt(11/48).
    """
    zc_logprobs = torch.tensor([-13.0, -23.0, -13.0, -18.0])
    next_sample_first_token_logprobs = torch.tensor([-2.0, -3.0, -2.5, -1.0])
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    ids = torch.zeros(4, dtype=torch.long)
    scored = torch.ones(4, dtype=torch.bool)
    verifier = grpo_advantages(rewards, ids)

    released_scores = ((next_sample_first_token_logprobs + 23.0) * 0.1).clamp(0, 1)
    assert torch.equal(released_scores, torch.ones(4))
    released = self_reward_advantages(released_scores, scored, ids, verifier, std_threshold=0.1)
    assert torch.equal(released, verifier)

    scores = self_reward_scores(zc_logprobs, ref_logprob=-23.0, beta=0.1)
    ours = self_reward_advantages(scores, scored, ids, verifier, std_threshold=0.1)
    std = math.sqrt(11 / 48)
    expected = torch.tensor([3 / 8 / std, -5 / 8 / std, 3 / 8 / std, -1 / 8 / std])
    torch.testing.assert_close(ours, expected)
    assert groups_mixed(scores, scored, ids, std_threshold=0.1) == 1.0


def test_released_defect_2_a_truncated_response_gets_a_numerator_from_its_first_token():
    """Scores 1, 0, 0 and one truncated response, which enters the mean as 0: mean 1/4, std 1/2.

    The released numerator of the truncated one is made of its first response token, log-prob -0.5, which
    clamps to 1: it is *rewarded* with (1 - 1/4) / (1/2) = 1.5. By the formula it gets
    (0 - 1/4) / (1/2) = -0.5.
    """
    zc_logprobs = torch.tensor([-13.0, -23.0, -23.0, math.nan])
    first_token_logprob = -0.5
    scored = torch.tensor([True, True, True, False])
    ids = torch.zeros(4, dtype=torch.long)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])

    mean, std = mean_and_std([1.0, 0.0, 0.0, 0.0])
    released_numerator = min(max((first_token_logprob + 23.0) * 0.1, 0.0), 1.0)
    assert (released_numerator - mean) / std == pytest.approx(1.5)

    scores = self_reward_scores(zc_logprobs, ref_logprob=-23.0, beta=0.1)
    ours = self_reward_advantages(scores, scored, ids, grpo_advantages(rewards, ids), std_threshold=0.1)
    torch.testing.assert_close(ours, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_a_scored_sample_without_a_score_is_refused():
    with pytest.raises(ValueError, match=r"scores\[1\] is NaN although"):
        self_reward_advantages(
            torch.tensor([1.0, math.nan]),
            torch.ones(2, dtype=torch.bool),
            torch.zeros(2, dtype=torch.long),
            torch.zeros(2),
            std_threshold=0.1,
        )


def test_mixture_is_convex_and_exact_where_both_agree():
    verifier = torch.tensor([1.0, -2.0, 0.1])
    own = torch.tensor([0.0, 3.0, 0.1])
    mixed = mix_advantages(verifier, own, tau=0.1)
    torch.testing.assert_close(mixed, torch.tensor([0.9, -1.5, 0.1]))
    assert mixed[2] == verifier[2]
    assert torch.equal(mix_advantages(verifier, own, tau=0.0), verifier)
    torch.testing.assert_close(mix_advantages(verifier, own, tau=1.0), own)
    with pytest.raises(ValueError, match=r"laser\.tau is 1\.5"):
        mix_advantages(verifier, own, tau=1.5)


def test_shares_of_mixed_and_of_uniform_groups():
    ids = torch.tensor([4, 4, 7, 7, 1, 1, 9])
    rewards = torch.tensor([1.0, 0.0, 0.1, 0.1, 0.0, 0.0, 1.0])
    scores = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.8, 0.1, 1.0])
    scored = torch.tensor([True, True, True, True, True, False, True])
    assert groups_uniform(rewards, ids) == 0.75
    assert groups_mixed(scores, scored, ids, std_threshold=0.1) == 0.5
    assert groups_mixed(scores, scored, ids, std_threshold=0.1, unscored="exclude") == 0.25


def test_an_empty_batch_has_empty_advantages():
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert grpo_advantages(none, ids).shape == (0,)
    assert self_reward_advantages(none, none.bool(), ids, none, std_threshold=0.1).shape == (0,)
    assert groups_mixed(none, none.bool(), ids, std_threshold=0.1) == 0.0
    assert groups_uniform(none, ids) == 0.0


def test_errors_name_the_setting_or_the_shapes():
    one, ids, yes = torch.zeros(1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rewards.*group_ids.*\[samples\]"):
        grpo_advantages(torch.zeros(2), ids)
    with pytest.raises(ValueError, match=r"laser\.unscored is 'drop'"):
        self_reward_advantages(one, yes, ids, one, std_threshold=0.1, unscored="drop")
    with pytest.raises(ValueError, match=r"laser\.std_threshold is -1"):
        groups_mixed(one, yes, ids, std_threshold=-1)

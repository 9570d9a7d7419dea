"""Policy losses, importance levels and terms for length: against the papers' formulas, one response at a time."""

import math
from functools import partial

import pytest
import torch

from megatron_laser.algorithms.advantages import discrepancy_advantages
from megatron_laser.algorithms.objectives import (
    POLICY_LOSSES,
    PolicyRows,
    needs_whole_responses,
    whole_responses,
)
from megatron_laser.algorithms.policy_loss import log_importance, weighted_policy_loss
from megatron_laser.algorithms.reward_shaping import length_penalties, overlong_penalties
from megatron_laser.user_functions import UserFunctionError, bind, load_function

LENGTHS = (3, 1, 5, 2)
SAMPLE = torch.tensor([i for i, length in enumerate(LENGTHS) for _ in range(length)])
CLIPS = {"clip_low": 0.2, "clip_high": 0.3}


def example(spread=0.4):
    """(log-probs, old log-probs [rows], advantages [samples]) in float64; ratios on both sides of the clips."""
    random = torch.Generator().manual_seed(3)
    old = torch.randn(len(SAMPLE), generator=random, dtype=torch.float64) - 3.0
    change = spread * torch.randn(len(SAMPLE), generator=random, dtype=torch.float64)
    return (old + change).requires_grad_(), old, torch.tensor([1.2, -0.7, -1.1, 0.4], dtype=torch.float64)


def average(values, sample=SAMPLE):
    """The mean over each row's response."""
    means = torch.stack(
        [values[sample == i].mean() if (sample == i).any() else values.sum() for i in range(4)]
    )
    return means[sample]


def plain(name, logprobs, old, advantages):
    """The objective as its paper writes it: a mean over responses of what each of them loses."""
    low, high, losses = 1 - CLIPS["clip_low"], 1 + CLIPS["clip_high"], []
    for i in range(len(LENGTHS)):
        a, own, before = advantages[i], logprobs[i == SAMPLE], old[i == SAMPLE]
        ratio = (own - before).exp()
        if name == "ppo":
            losses.append(-torch.minimum(ratio * a, ratio.clamp(low, high) * a).mean())
        elif name == "gspo":
            s = (own - before).mean().exp()
            losses.append(-torch.minimum(s * a, s.clamp(low, high) * a))
        elif name == "cispo":
            losses.append(-(ratio.detach().clamp(low, high) * a * own).mean())
        elif name == "gmpo":
            bounded = ratio.clamp(max=high) if a > 0 else ratio.clamp(min=low)
            losses.append(-a * bounded.log().mean().exp())
        else:
            tau = 1.0 if a > 0 else 1.05
            losses.append(-(4 / tau * torch.sigmoid(tau * (ratio - 1)) * a).mean())
    return torch.stack(losses).mean()


def mean_of_responses(name, rows, logprobs, old, advantages):
    """The same through the registry, of some rows: token means of a mean over responses."""
    keywords = CLIPS if name != "sapo" else {}
    weights = torch.tensor([1 / (len(LENGTHS) * length) for length in LENGTHS], dtype=torch.float64)[SAMPLE]
    return weighted_policy_loss(
        partial(POLICY_LOSSES[name], **keywords),
        logprobs[rows],
        old[rows],
        advantages[SAMPLE][rows],
        weights[rows],
        average=partial(average, sample=SAMPLE[rows]),
    ).loss


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_loss_and_gradient_are_the_papers(name):
    logprobs, old, advantages = example()
    expected = plain(name, logprobs, old, advantages)
    found = mean_of_responses(name, slice(None), logprobs, old, advantages)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted, given = (torch.autograd.grad(loss, logprobs)[0] for loss in (expected, found))
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-14)
    assert given.count_nonzero() > len(SAMPLE) / 2


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_loss_does_not_depend_on_how_responses_are_cut_into_micro_batches(name):
    logprobs, old, advantages = example()
    whole = mean_of_responses(name, slice(None), logprobs, old, advantages)
    parts = [mean_of_responses(name, rows, logprobs, old, advantages) for rows in (slice(0, 4), slice(4, 11))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(sum(parts), logprobs),
        torch.autograd.grad(whole, logprobs),
        rtol=1e-10,
        atol=1e-14,
    )


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_every_loss_has_the_policy_gradient(name):
    logprobs, _, advantages = example()
    loss = mean_of_responses(name, slice(None), logprobs, logprobs.detach(), advantages)
    (found,) = torch.autograd.grad(loss, logprobs)
    expected = -advantages[SAMPLE] / torch.tensor([4.0 * length for length in LENGTHS]).double()[SAMPLE]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_clipped_rows_are_counted_where_the_bound_holds():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5], dtype=torch.float64)
    rows = PolicyRows(ratio.log(), torch.zeros(5).double(), torch.tensor([1.0, 1, 1, -1, -1]).double())
    assert POLICY_LOSSES["ppo"](rows, **CLIPS).clipped.tolist() == [False, False, True, True, False]
    assert POLICY_LOSSES["cispo"](rows, **CLIPS).clipped.tolist() == [True, False, True, True, True]
    rows = PolicyRows(rows.logprobs, rows.old_logprobs, rows.advantages, lambda values: values)
    assert POLICY_LOSSES["gmpo"](rows, **CLIPS).clipped.tolist() == [False, False, True, True, False]


def test_a_loss_that_looks_at_responses_has_to_say_so():
    rows = PolicyRows(torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="@whole_responses"):
        rows.response_mean(torch.zeros(2))
    assert [name for name, function in POLICY_LOSSES.items() if needs_whole_responses(function)] == [
        "gspo",
        "gmpo",
    ]
    assert needs_whole_responses(partial(whole_responses(lambda rows, clip: rows), clip=1.0))


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [0.1, -0.3, 0.5, 0.2]),
        ("sequence", [0.3, 0.3, 0.3, 0.2]),
        ("geometric", [0.1, 0.1, 0.1, 0.2]),
    ],
)
def test_importance_is_of_tokens_or_of_whole_responses(level, expected):
    old = torch.tensor([0.1, -0.3, 0.5, 0.2], dtype=torch.float64)
    sample = torch.tensor([0, 0, 0, 1])
    found = log_importance(
        old,
        torch.zeros_like(old),
        level=level,
        average=lambda values: torch.stack([values[sample == i].mean() for i in (0, 1)])[sample],
        lengths=torch.tensor([3, 3, 3, 1]),
    )
    assert found.tolist() == pytest.approx(expected)


def test_overlong_responses_lose_linearly_and_those_that_were_cut_off_all():
    lengths = torch.tensor([1, 80, 90, 100, 100])
    cut = torch.tensor([False, False, False, False, True])
    found = overlong_penalties(lengths, max_new_tokens=100, buffer=20, penalty=2.0, truncated=cut)
    assert found.tolist() == [0.0, 0.0, -1.0, -2.0, -2.0]
    with pytest.raises(ValueError, match="expected 1 to 100 tokens"):
        overlong_penalties(lengths, max_new_tokens=100, buffer=101, penalty=1.0, truncated=cut)


def test_in_a_group_short_right_responses_gain_and_wrong_ones_only_lose():
    lengths = torch.tensor([10, 20, 30, 10, 7, 7])
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    found = length_penalties(lengths, rewards, groups, weight=0.4)
    assert found.tolist() == pytest.approx([0.2, 0.0, -0.2, 0.0, 0.0, 0.0])


def test_responses_whose_score_disagrees_count_more():
    scores = torch.tensor([0.9, 0.1, 0.5, math.nan])
    scored = torch.tensor([True, True, True, False])
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
    groups = torch.zeros(4, dtype=torch.int64)
    found = discrepancy_advantages(
        torch.tensor([1.0, 1.0, -1.0, -1.0]), scores, scored, rewards, groups, kappa=2.0, bounds=(0.5, 1.5)
    )
    # distances 0.1, 0.9, 0.5 with mean 0.5: factors 1 - 0.8 -> 0.5, 1 + 0.8 -> 1.5, 1; the last has no score
    assert found.tolist() == pytest.approx([0.5, 1.5, -1.0, -1.0])


def test_a_users_function_is_loaded_and_given_its_options(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(rows, *, clip_low, sharpness=1.0):\n    return (rows, clip_low, sharpness)\n")
    function = load_function("policy.loss", f"{file}:mine")
    bound = bind(
        "policy.loss", function, 1, known={"clip_low": 0.2, "clip_high": 0.3}, options={"sharpness": 4}
    )
    assert bound("rows") == ("rows", 0.2, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "expected 'path/to/file.py:function'"),
        ("{folder}/no.py:mine", "there is no file"),
        ("{folder}/mine.py:other", "has no function 'other'; its functions: mine"),
        ("{folder}/broken.py:mine", "importing .* failed: ZeroDivisionError"),
        ("no.such.module:mine", "importing no.such.module failed"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, spec, message):
    (tmp_path / "mine.py").write_text("def mine(rows):\n    return rows\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserFunctionError, match=message):
        load_function("policy.loss", spec.format(folder=tmp_path))


def test_options_that_do_not_fit_are_named():
    def mine(rows, *, sharpness):
        return rows

    with pytest.raises(UserFunctionError, match="takes no option 'blunt'; it takes sharpness"):
        bind("policy.loss", mine, 1, known={}, options={"blunt": 1})
    with pytest.raises(UserFunctionError, match=r"missing a required.*sharpness"):
        bind("policy.loss", mine, 1, known={}, options={})


def test_a_loss_has_to_give_one_number_for_each_row():
    rows = torch.zeros(3)
    with pytest.raises(ValueError, match="expected one loss for each of 3 rows"):
        weighted_policy_loss(lambda rows: rows.logprobs.sum(), rows, rows, rows, rows)

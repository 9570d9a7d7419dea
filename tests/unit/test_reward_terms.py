"""Terms, weights, label and threshold against numbers by hand, from the worker to advantages, metrics and records."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers.runs import run_config

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.config import ConfigError
from megatron_laser.evaluation.benchmarks.folder import benchmark_settings
from megatron_laser.evaluation.benchmarks.settings import benchmark_rule, load_benchmarks
from megatron_laser.observability.rollout_dump import dump_rollouts
from megatron_laser.observability.rollout_metrics import rollout_metrics
from megatron_laser.rewards import Grade, RewardRule, reward_rule
from megatron_laser.rewards.workers.user_code import described
from megatron_laser.rollout.pending import OpenGroup, sample_from, sample_state
from megatron_laser.run.recorded_batches import read_batch, write_batch
from megatron_laser.trainer.objective import Objective
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

BOTH = RewardRule(weights={"correct": 1.0, "format": 0.25}, label="correct")


# --- what functions return


def test_the_policy_learns_from_the_weighted_sum_and_the_label_is_the_named_term():
    grade = BOTH.grade({"correct": True, "format": np.float32(0.5), "shown": 7}, {})
    assert grade == Grade(
        1.0, "correct", terms={"correct": 1.0, "format": 0.5, "shown": 7.0}, policy_reward=1.125
    )
    assert BOTH.grade({"correct": 0, "format": 1}, {}) == Grade(
        0.0, "wrong", terms={"correct": 0.0, "format": 1.0}, policy_reward=0.25
    )


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ({}, "a dict without a term"),
        ({"a\nb": 1.0}, r"a text of one line and up to 100 characters, not 'a\\nb'"),
        ({"x" * 101: 1.0}, "up to 100 characters"),
        ({"": 1.0}, "not ''"),
        ({"sum": 1.0}, "a term has another name than 'sum'"),  # which reward.terms could not weigh
    ],
)
def test_names_of_terms_can_be_names_of_metrics(returned, problem):
    with pytest.raises(ValueError, match=problem):
        BOTH.grade(returned, {})


def test_an_error_that_says_nothing_of_itself_is_still_named():
    class Speechless(Exception):
        def __str__(self):
            raise RuntimeError

    assert described(Speechless()).startswith("Speechless")


def test_a_threshold_makes_any_number_a_label():
    rule = RewardRule(threshold=0.0)
    assert rule.grade(-1.0, {}) == Grade(0.0, "wrong", terms={"reward": -1.0}, policy_reward=-1.0)
    assert rule.grade(0, {}) == Grade(1.0, "correct", terms={"reward": 0.0}, policy_reward=0.0)
    summed = RewardRule(weights={"a": 2.0, "b": -1.0}, label="sum", threshold=1.5)
    assert [summed.grade({"a": 1, "b": b}, {}).reward for b in (0.5, 0.6)] == [1.0, 0.0]


def test_functions_of_their_own_are_terms_beside_the_verifier_s_number():
    rule = RewardRule(weights={"reward": 1.0, "brief": -0.5}, functions={"brief": "my.py:brief"})
    grade = rule.grade(Grade(0.0, "no_answer", answer="4"), {"brief": 3})
    assert grade == Grade(0.0, "no_answer", "4", {"reward": 0.0, "brief": 3.0}, -1.5)
    assert rule.grade(1, {"brief": Grade(0.0, "timeout")}) == Grade(0.0, "timeout")
    assert rule.grade(Grade(0.0, "crash"), {"brief": 1}) == Grade(0.0, "crash")


def test_a_term_that_does_not_apply_is_left_out_of_the_sum():
    grade = BOTH.grade({"correct": 1.0, "format": None}, {})
    assert grade.policy_reward == 1.0 and grade.terms == {"correct": 1.0, "format": None}
    with pytest.raises(ValueError, match="'correct' is None, not applicable"):
        BOTH.grade({"correct": None, "format": 1.0}, {})


def test_one_number_without_terms_is_what_it_was():
    assert RewardRule().grade(0.25, {}) == Grade(0.25, "wrong")
    assert RewardRule().grade(Grade(0.3, "unparsable"), {}) == Grade(0.3, "unparsable")
    # a Grade may say more: shown, and learned from as before
    assert RewardRule().grade(Grade(1.0, "wrong", answer="a", terms={"format": 2.0}), {}) == Grade(
        1.0, "wrong", "a", {"reward": 1.0, "format": 2.0}
    )


@pytest.mark.parametrize(
    ("rule", "value", "own", "message"),
    [
        (RewardRule(), {"a": 1.0, "b": 0.0}, {}, r"terms 'a', 'b': give .* reward.terms: \{a: 1.0, b: 1.0\}"),
        (RewardRule(weights={"a": 1.0}), {"a": 1.0}, {}, "of which none is the label: name in reward.label"),
        (
            BOTH,
            {"correct": 1.0},
            {},
            "reward.terms names 'format', and the function returned the terms 'correct'",
        ),
        (RewardRule(weights={"a": 1.0}, label="x"), {"a": 1.0}, {}, "reward.label names 'x'"),
        (BOTH, {"correct": 2.0, "format": 0}, {}, r"the label \('correct', reward.label\) .* not 2.0"),
        (BOTH, {"correct": math.inf, "format": 0}, {}, "'correct' is inf; expected a finite number"),
        (BOTH, {"correct": "yes", "format": 0}, {}, "'correct' is 'yes'; expected a finite number"),
        (
            BOTH,
            {"correct": 1.0, "format": 0},
            {"format": 1.0},
            "returned by reward.function and has a function",
        ),
        (BOTH, {"correct": 1.0}, {"format": {"x": 1.0}}, "'format' returns one number, not the terms x"),
        (BOTH, [1.0], {}, "a number, a Grade or a dict of numbers, not list"),
    ],
)
def test_what_makes_no_reward_is_named(rule, value, own, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rule.grade(value, own)


# --- settings


def test_settings_are_weights_or_functions_and_their_paths_start_at_the_file(tmp_path):
    terms = {"reward": "1e0", "brief": {"function": "verl:my.py:brief", "weight": -0.5}}
    rule = reward_rule(run_config(tmp_path, tmp_path, reward={"terms": terms, "label": "sum"}).reward)
    assert rule.weights == {"reward": 1.0, "brief": -0.5} and rule.label == "sum"
    assert rule.functions == {"brief": f"verl:{tmp_path}/my.py:brief"}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"a b": 1.0}, "names of letters"),
        ({"sum": 1.0}, "another name than sum"),
        ({"reward": {"function": "my.py:f"}}, "no function for the term reward"),
        ({"a": {"wieght": 1.0}}, "wieght"),
        ({"a": "much"}, "much"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, terms, message):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, tmp_path, reward={"terms": terms})


def test_an_evaluation_judges_as_the_run_did_where_the_verifier_is_the_run_s(tmp_path):
    file = tmp_path / "aime.jsonl"
    file.write_text('{"problem": "1 + 1", "answer": "2"}\n')
    from_run = {"reward": "my.py:f", "reward_rule": asdict(RewardRule({"a": 2.0}, {}, "a", 0.5))}
    (same,) = load_benchmarks(file, from_run=from_run)
    assert benchmark_rule(same) == RewardRule({"a": 2.0}, {}, "a", 0.5)
    assert benchmark_settings(same)["reward_rule"]["threshold"] == 0.5
    (other,) = load_benchmarks(file, ["aime.reward=math_verify"], from_run=from_run)
    assert benchmark_rule(other).is_plain and "reward_rule" not in benchmark_settings(other)
    (own,) = load_benchmarks(file, ["aime.reward_threshold=0", "aime.reward_label=b"], from_run=from_run)
    assert benchmark_rule(own) == RewardRule(label="b", threshold=0.0)


# --- from samples to the loss

# (label, reward that the policy learns from) of two groups of three
SAMPLES = [(1.0, 1.1), (0.0, 0.1), (0.0, -1.0), (1.0, 2.0), (1.0, 1.0), (1.0, 0.0)]


def batch(split=True):
    groups = []
    for row in range(2):
        prompt = Prompt(row, "?", "1", [3], columns='{"tests": "x"}' if split else "")
        samples = []
        for number, (label, learned) in enumerate(SAMPLES[3 * row : 3 * row + 3]):
            one = Generation([5, 6, 1], [-1.0, -1.0, -1.0], "stop", 0)
            more = {"policy_reward": learned, "terms": {"a": learned, "b": None if number else 4.0}}
            sample = Sample([3], one, "t", True, label, "correct" if label else "wrong", -5.0)
            for name, value in more.items() if split else ():
                setattr(sample, name, value)
            samples.append(sample)
        groups.append(Group(prompt, samples))
    groups[0].samples[0].vote_answer = "42" if split else None
    return RolloutBatch(1, 0, groups)


def test_advantages_are_of_what_the_policy_learns_from_and_the_rest_is_of_labels(tmp_path):
    seen = {}
    (tmp_path / "mine.py").write_text("def look(batch):\n    return batch.rewards + 10 * batch.labels\n")
    flat = FlatBatch.from_arrays(flatten(batch()).to_arrays())
    np.testing.assert_array_equal(flat.rewards, [label for label, _ in SAMPLES])
    facts = dict(
        rewards=torch.from_numpy(flat.policy_rewards),
        labels=torch.from_numpy(flat.rewards),
        group_ids=torch.tensor([0, 0, 0, 1, 1, 1]),
        lengths=torch.full((6,), 3),
        sampled_lengths=torch.full((6,), 3),
        truncated=torch.zeros(6, dtype=torch.bool),
        scores=[],
        step=1,
    )
    config = run_config(tmp_path, tmp_path, laser={"enabled": False}, policy={"advantage": "dr_grpo"})
    seen, _ = Objective(config).advantages(**facts)
    learned = np.array([value for _, value in SAMPLES], np.float32).astype(np.float64).reshape(2, 3)
    expected = learned - learned.mean(1, keepdims=True)
    np.testing.assert_allclose(seen.numpy(), expected.ravel(), atol=1e-6)
    own = run_config(
        tmp_path, tmp_path, laser={"enabled": False}, policy={"advantage": f"{tmp_path}/mine.py:look"}
    )
    seen, _ = Objective(own).advantages(**facts)
    np.testing.assert_allclose(seen.numpy(), [v + 10 * r for r, v in SAMPLES], atol=1e-6)


def test_metrics_tell_terms_rewards_and_labels_apart():
    scores = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.9, 0.4])
    metrics = rollout_metrics(batch(), scores, scores)
    assert metrics["reward/a"] == pytest.approx(3.2 / 6) and metrics["reward/b"] == 4.0
    assert metrics["reward_mean"] == pytest.approx(3.2 / 6)
    assert metrics["groups_uniform_fraction"] == 0.0  # the second group's labels are all 1
    assert metrics["self_reward_accuracy"] == pytest.approx(5 / 6)  # the last one scores low and is right
    plain = rollout_metrics(batch(split=False), scores, scores)
    assert not any(name.startswith("reward/") for name in plain)
    assert plain["groups_uniform_fraction"] == 0.5 and plain["reward_mean"] == pytest.approx(4 / 6)


def test_batches_dumps_and_checkpoints_keep_terms_and_one_reward_adds_nothing_to_them(tmp_path):
    both = batch()
    write_batch(tmp_path, both, {}, {})
    again = read_batch(tmp_path, 1).batch
    assert again == both and again.groups[0].prompt.columns == '{"tests": "x"}'
    assert [sample_from(sample_state(s), both.groups[0].prompt) for s in both.groups[0].samples] == list(
        both.groups[0].samples
    )
    dump_rollouts(tmp_path / "dump.jsonl", both, [0.5] * 6, [0.0] * 6)
    first = json.loads((tmp_path / "dump.jsonl").read_text().splitlines()[0])
    assert first["reward"] == 1.0 and first["policy_reward"] == 1.1 and first["vote_answer"] == "42"

    plain = batch(split=False)
    assert "policy_rewards" not in flatten(plain).to_arrays()
    write_batch(tmp_path, plain, {}, {})
    text = (tmp_path / "step_1.json").read_text()
    assert not any(word in text for word in ("columns", "terms", "policy_reward", "vote_answer"))
    assert not sample_state(plain.groups[0].samples[0]).keys() & {"terms", "policy_reward", "vote_answer"}


def test_a_group_is_uniform_by_what_the_policy_learns_from():
    from concurrent.futures import Future

    group = OpenGroup(0, Prompt(0, "?", "1", [3]), 2)
    for number, learned in enumerate((0.5, 0.25)):
        group.grades[number] = Future()
        group.grades[number].set_result(Grade(1.0, "correct", policy_reward=learned))
    assert not group.is_uniform()

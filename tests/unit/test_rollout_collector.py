"""Groups whose rewards are all equal are dropped and replaced, within a cap, and the cursor stays exact."""

import json
import logging
from concurrent.futures import Future

import pytest
import torch

from megatron_laser.algorithms.advantages import grpo_advantages
from megatron_laser.batching.flat import flatten
from megatron_laser.data import PromptCursor
from megatron_laser.observability.rollout_dump import dump_rollouts
from megatron_laser.observability.rollout_metrics import rollout_metrics
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Grade, GradingPoolError
from megatron_laser.rollout.client.errors import WeightsNeeded
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.endings import Endings, NothingEnds
from megatron_laser.rollout.pending import batch_from, batch_state
from megatron_laser.types import Generation, Prompt, SamplingParams

STOP = 1


class Engine:
    """Answers each prompt with its own ids; remembers what it was asked."""

    def __init__(self):
        self.version = 0
        self.calls = []

    def generate(self, prompts, sampling, *, deadline, on_finished, stop=None):
        assert 0 < deadline <= 60
        self.calls.append(([ids[0] for ids in prompts], sampling.seed))
        results = []
        for p, ids in enumerate(prompts):
            group = []
            for s in range(sampling.samples_per_prompt):
                group.append(Generation([ids[0], 10 + s, STOP], [-1.0] * 3, "stop", self.version))
                on_finished(p, s, group[-1])
            results.append(group)
        return results


class Grading:
    """Only prompts in `mixed` have a right and a wrong answer; even ones are else all right, odd ones all wrong."""

    def __init__(self, mixed):
        self.mixed = mixed

    def submit(self, text, answer, facts=None):
        prompt, sample = (int(word) for word in text.split())
        right = sample == 10 if prompt in self.mixed else prompt % 2 == 0
        future = Future()
        future.set_result(Grade(float(right), "correct" if right else "wrong"))
        return future


def collector(mixed, *, prompts=20, per_step=4, tries=12, fewest_groups=1, cursor=None):
    data = [Prompt(row, "", "", [100 + row]) for row in range(prompts)]
    engine = Engine()
    made = RolloutCollector(
        engine,
        Grading({100 + row for row in mixed}),
        data,
        cursor or PromptCursor(prompts, 7, False),
        sampling=SamplingParams(2, 8, (STOP,)),
        prompts_per_step=per_step,
        decode=lambda ids: " ".join(map(str, ids)),
        deadline=60.0,
        seed=3,
        timers=Timers(),
        tries=tries,
        fewest_groups=fewest_groups,
    )
    return made, engine


def counts(*, tried, accuracy, mixed=0, right=0, wrong=0, missing=0, failed=0):
    """`mixed`: groups of which one of the two responses is right."""
    return {
        "prompts_tried": tried,
        "groups_dropped": right + wrong,
        "groups_dropped_right": right,
        "groups_dropped_wrong": wrong,
        "accuracy_tried": pytest.approx(accuracy),
        "pass_at_1": pytest.approx(accuracy),
        "pass_at_2": pytest.approx(accuracy + mixed / (2 * tried)),
        "groups_missing": missing,
        "grading_failed": failed,
    }


def rows(batch):
    return [group.prompt.row for group in batch.groups]


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("again", ["goes on", "is resumed"])
def test_an_interrupted_step_counts_every_group_once(call, again):
    made, engine = collector(mixed=(1, 2, 5, 8, 9))
    before = made.state()
    generate, calls = engine.generate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise WeightsNeeded("a server came back")
        return generate(*arguments, **options)

    engine.generate = interrupted
    with pytest.raises(WeightsNeeded):
        made.collect(1)
    if again == "is resumed":
        assert made.state() == before
        made, _ = collector(mixed=(1, 2, 5, 8, 9))
        made.load_state(before)
    assert rows(made.collect(1)) == [1, 2, 5, 8]
    assert made.metrics == counts(tried=9, mixed=4, right=3, wrong=2, accuracy=(4 + 6) / 18)


def test_steps_without_any_score_are_counted_across_a_resume_and_the_last_one_is_tried_again():
    def made_with(count, engine=None):
        watch = Endings((99,), max_new_tokens=8, steps=50, limit=3)
        watch.in_a_row = count
        made, engine = collector(mixed=(), tries=None)
        made._endings, made._sampling = watch, SamplingParams(2, 8, (99,))
        return made, engine

    made, engine = made_with(0)
    for step in (1, 2):
        made.collect(step)
        engine.version = step
    state = made.state()
    assert state["unscored_steps"] == 2
    resumed, engine = made_with(0)
    resumed.load_state(json.loads(json.dumps(state)))
    engine.version = 2
    with pytest.raises(NothingEnds, match="3 steps in a row"):
        resumed.collect(3)
    assert resumed.state() == state


def test_without_dropping_every_group_is_kept():
    made, engine = collector(mixed=(), tries=None)
    assert rows(made.collect(1)) == [0, 1, 2, 3]
    assert made.metrics == counts(tried=4, accuracy=1 / 2)
    assert len(engine.calls) == 1


def test_uniform_groups_are_dropped_and_further_prompts_asked_for_until_enough_are_there():
    made, engine = collector(mixed=(1, 2, 5, 8, 9))
    batch = made.collect(1)
    assert rows(batch) == [1, 2, 5, 8]
    assert [prompts for prompts, _ in engine.calls] == [[100, 101, 102, 103], [104, 105], [106], [107], [108]]
    # Dropped: 0, 4 and 6 are all right, 3 and 7 all wrong.
    assert made.metrics == counts(tried=9, mixed=4, right=3, wrong=2, accuracy=(4 + 6) / 18)
    # What was sampled for groups that were dropped and for those that were kept.
    sampled = {"rate/generated_tokens": 9 * 2 * 3}
    assert batch.metrics == made.metrics | sampled
    assert all({sample.reward for sample in group.samples} == {0.0, 1.0} for group in batch.groups)


def test_every_round_of_every_step_samples_with_its_own_seed():
    made, engine = collector(mixed=(1, 5, 8, 11), per_step=2)
    made.collect(1)
    engine.version = 1
    made.collect(2)
    seeds = [seed for _, seed in engine.calls]
    assert len(set(seeds)) == len(seeds) > 3
    plain, plain_engine = collector(mixed=(1, 5, 8, 11), per_step=2, tries=None)
    plain.collect(1)
    assert plain_engine.calls[0][1] == seeds[0]  # the first round's seed does not depend on dropping


def test_at_the_cap_the_step_uses_what_is_there_and_counts_what_is_missing(caplog):
    made, _ = collector(mixed=(1, 7), tries=8)
    with caplog.at_level(logging.WARNING):
        assert rows(made.collect(1)) == [1, 7]
        assert made.metrics == counts(tried=8, mixed=2, right=4, wrong=2, missing=2, accuracy=(2 + 8) / 16)
        made._engine.version = 1
        made.collect(2)
    assert caplog.text.count("rollout.oversampling_cap") == 1


def test_a_short_batch_is_filled_up_to_one_group_for_each_optimizer_step():
    made, _ = collector(mixed=(5,), tries=8, fewest_groups=3)
    assert rows(made.collect(1)) == [5, 0, 1]
    # Dropped: 2, 4, 6 and 3, 7; the stand-ins 0 and 1 count once.
    assert made.metrics == counts(tried=8, mixed=1, right=3, wrong=2, missing=3, accuracy=(1 + 8) / 16)


def test_a_step_without_any_unequal_group_runs_on_uniform_ones_and_says_so_once(caplog):
    made, engine = collector(mixed=(), tries=8)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            engine.version = step - 1
            assert len(rows(made.collect(step))) == 4
            assert made.metrics == counts(tried=8, right=2, wrong=2, missing=4, accuracy=1 / 2)
    assert caplog.text.count("the verifier's advantages are 0 and only the self-reward learns") == 1


def test_a_resumed_run_tries_the_same_prompts_with_the_same_seeds():
    mixed = (1, 2, 5, 8, 9, 13, 17)
    made, engine = collector(mixed, per_step=2)
    batches, states = [], []
    for step in (1, 2, 3):
        engine.version = step - 1
        batches.append(rows(made.collect(step)))
        states.append(made._cursor.state_dict())
    cursor = PromptCursor(20, 7, False)
    cursor.load_state_dict(states[0])
    resumed, other = collector(mixed, per_step=2, cursor=cursor)
    for step in (2, 3):
        other.version = step - 1
        assert rows(resumed.collect(step)) == batches[step - 1]
        assert cursor.state_dict() == states[step - 1]
    assert engine.calls[-len(other.calls) :] == other.calls


def test_grading_that_passes_the_deadline_names_the_setting():
    made, _ = collector(mixed=(), tries=None)
    made._deadline = 0.1
    made._grading.submit = lambda text, answer, facts: Future()
    with pytest.raises(
        TimeoutError, match=r"step 1: responses were not graded within rollout\.deadline 0\.1 s"
    ):
        made.collect(1)


class FailingGrading(Grading):
    """Fails on the (prompt, sample) pairs in `failing`; each prompt's sample 10 is else right and 11 wrong."""

    last_trouble = "crash: ValueError: no (mine.py:2 in grade)"

    def __init__(self, failing):
        super().__init__({100 + row for row in range(40)})
        self.failing = failing

    def submit(self, text, answer, facts=None):
        if tuple(int(word) for word in text.split()) not in self.failing:
            return super().submit(text, answer)
        future = Future()
        future.set_result(Grade(0.0, "crash"))
        return future


def failing_collector(failing, **settings):
    made, engine = collector(mixed=(), **settings)
    made._grading = FailingGrading(failing)
    made._sampling = SamplingParams(3, 8, (STOP,))
    return made, engine


def test_a_response_that_could_not_be_graded_is_in_neither_baseline_nor_score_labels():
    made, _ = failing_collector({(101, 12), (102, 10), (102, 11), (102, 12)}, tries=None, per_step=3)
    batch = made.collect(1)
    assert made.metrics["grading_failed"] == 4
    assert [len(group.samples) for group in batch.groups] == [3, 2, 0]
    flat = flatten(batch)
    assert flat.rewards.tolist() == [1, 0, 0, 1, 0] and flat.group_ids.tolist() == [0, 0, 0, 1, 1]
    advantages = grpo_advantages(torch.from_numpy(flat.rewards), torch.from_numpy(flat.group_ids).long())
    pair = grpo_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64))
    assert advantages[3:].tolist() == pair.tolist()  # with a wrong third one: 1.15 and -0.58
    none = torch.full((5,), float("nan"))
    metrics = rollout_metrics(batch, none, none)
    assert metrics["outcome/crash"] == 4 and metrics["outcome/wrong"] == 3
    assert metrics["reward_mean"] == 2 / 5


def test_a_group_in_which_only_equal_rewards_are_left_is_dropped_as_uniform():
    made, _ = failing_collector({(100, 10), (102, 11)}, per_step=3)
    batch = made.collect(1)
    assert rows(batch) == [1, 2, 3]  # 0 has two wrong ones left
    assert made.metrics["groups_dropped"] == 1 and made.metrics["grading_failed"] == 2


def test_groups_without_any_grade_are_replaced_where_groups_are_replaced_and_missing_elsewhere():
    lost = {(101, sample) for sample in (10, 11, 12)}
    replaced = failing_collector(lost, per_step=3)[0].collect(1)
    assert [group.prompt.row for group in replaced.groups if group.samples] == [0, 2, 3]
    kept = failing_collector(lost, per_step=3, tries=None)[0].collect(1)
    assert [group.prompt.row for group in kept.groups if group.samples] == [0, 2]


def test_a_step_in_which_nothing_could_be_graded_stops_with_the_reason():
    everything = {(100 + row, sample) for row in range(40) for sample in (10, 11, 12)}
    for tries in (None, 12):
        made, engine = failing_collector(everything, tries=tries)
        before = made.state()
        with pytest.raises(
            GradingPoolError, match=r"step 1: not one response.*12 crash.*mine\.py:2 in grade"
        ):
            made.collect(1)
        assert len(engine.calls) == 1  # no further prompts are tried
        assert made.state() == before  # the checkpoint that is saved now tries the same prompts again


def test_too_few_groups_for_the_optimizer_steps_stop_with_the_reason():
    most = {(100 + row, sample) for row in range(3) for sample in (10, 11, 12)}
    made, _ = failing_collector(most, tries=None, fewest_groups=2)
    with pytest.raises(GradingPoolError, match=r"only 1 of 4 groups.*policy\.minibatches needs 2"):
        made.collect(1)


def test_ungraded_responses_are_dumped_without_a_reward_and_kept_in_a_checkpoint(tmp_path):
    made, _ = failing_collector({(100, 11)}, tries=None, per_step=2)
    batch = made.collect(1)
    dump_rollouts(tmp_path / "dump.jsonl", batch, [0.5] * 5, [1.0] * 5)
    lines = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [1.0, 0.0, None, 1.0, 0.0, 0.0]
    assert lines[2]["outcome"] == "crash" and lines[2]["advantage"] is None
    state = json.loads(json.dumps(batch_state(batch, {0: 0, 1: 1})))
    assert batch_from(state, made._prompts) == batch

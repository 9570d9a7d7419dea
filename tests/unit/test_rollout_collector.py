"""Groups whose rewards are all equal are dropped and replaced, within a cap, and the cursor stays exact."""

import logging
from concurrent.futures import Future

import pytest

from megatron_laser.data import PromptCursor
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Grade
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.types import Generation, Prompt, SamplingParams

STOP = 1


class Engine:
    """Answers each prompt with its own ids; remembers what it was asked."""

    def __init__(self):
        self.version = 0
        self.calls = []

    def generate(self, prompts, sampling, *, deadline, on_finished):
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

    def submit(self, text, answer):
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


def rows(batch):
    return [group.prompt.row for group in batch.groups]


def test_without_dropping_every_group_is_kept():
    made, engine = collector(mixed=(), tries=None)
    assert rows(made.collect(1)) == [0, 1, 2, 3]
    assert made.metrics == {"prompts_tried": 4, "groups_dropped": 0, "groups_missing": 0}
    assert len(engine.calls) == 1


def test_uniform_groups_are_dropped_and_further_prompts_asked_for_until_enough_are_there():
    made, engine = collector(mixed=(1, 2, 5, 8, 9))
    batch = made.collect(1)
    assert rows(batch) == [1, 2, 5, 8]
    assert [prompts for prompts, _ in engine.calls] == [[100, 101, 102, 103], [104, 105], [106], [107], [108]]
    assert made.metrics == {"prompts_tried": 9, "groups_dropped": 5, "groups_missing": 0}
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
        assert made.metrics == {"prompts_tried": 8, "groups_dropped": 6, "groups_missing": 2}
        made._engine.version = 1
        made.collect(2)
    assert caplog.text.count("rollout.oversampling_cap") == 1


def test_a_short_batch_is_filled_up_to_one_group_for_each_optimizer_step():
    made, _ = collector(mixed=(5,), tries=8, fewest_groups=3)
    assert rows(made.collect(1)) == [5, 0, 1]
    assert made.metrics == {"prompts_tried": 8, "groups_dropped": 5, "groups_missing": 3}


def test_a_step_without_any_unequal_group_runs_on_uniform_ones_and_says_so_once(caplog):
    made, engine = collector(mixed=(), tries=8)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            engine.version = step - 1
            assert len(rows(made.collect(step))) == 4
            assert made.metrics == {"prompts_tried": 8, "groups_dropped": 4, "groups_missing": 4}
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
    made._grading.submit = lambda text, answer: Future()
    with pytest.raises(
        TimeoutError, match=r"step 1: responses were not graded within rollout\.deadline 0\.1 s"
    ):
        made.collect(1)

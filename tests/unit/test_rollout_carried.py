"""Rollouts that stop early: what is carried over, how old it may get, that nothing is lost or doubled."""

import json
import math
from collections import Counter

import pytest
from helpers.collecting import PROMPTS, collector, rows, spans_of, varied
from helpers.stepping_engine import STOP, Grading, SteppingEngine

from megatron_laser.data import PromptCursor
from megatron_laser.rollout.client.errors import ServersLost, WeightsNeeded
from megatron_laser.rollout.engine import ResumableEngine, StopEarly, StoppedEarly
from megatron_laser.rollout.progress import staleness_metrics, token_ages
from megatron_laser.types import Generation, Group, Sample, WeightSpan


def train(made, engine, steps, first=1):
    """Collect `steps`, with new weights after each."""
    batches = []
    for step in range(first, first + steps):
        engine.version = step - 1
        batches.append(made.collect(step))
    return batches


def test_the_fake_is_a_resumable_engine():
    assert isinstance(SteppingEngine(varied), ResumableEngine)


# early stop --------------------------------------------------------------------------------------------------------


def test_generation_stops_when_enough_groups_are_complete_and_the_rest_is_carried():
    long = {104, 105}
    engine = SteppingEngine(lambda prompt, sample: 50 if prompt in long else 4)
    made = collector(engine, prompts_per_step=4)
    made._cursor = PromptCursor(len(PROMPTS), 5, False)
    batch = made.collect(1)
    assert rows(batch) == [0, 1, 2, 3]
    assert engine.tokens < 12 * 5  # 6 prompts x 2 responses; the long ones alone would take 200
    assert batch.metrics["groups_carried"] == 2 and batch.metrics["prompts_tried"] == 6
    engine.version = 1
    after = made.collect(2)
    assert rows(after)[:2] != [4, 5]  # they are still too long: shorter ones of newer prompts come first
    assert engine.calls[12:16] == [(104, 0, 3), (104, 1, 3), (105, 0, 3), (105, 1, 3)]


@pytest.mark.parametrize("tokens", [0, 5, 30])
def test_a_step_that_is_given_up_leaves_the_state_before_it(tokens):
    engine = SteppingEngine(lambda prompt, sample: 50 if prompt in {104, 105} else 4)
    made = collector(engine, prompts_per_step=4)
    made._cursor = PromptCursor(len(PROMPTS), 5, False)
    made.collect(1)
    before, begun, stop, longer = json.dumps(made.state()), engine.tokens, StopEarly(), engine._longer

    def counted(*arguments):
        if engine.tokens - begun >= tokens:
            stop.set()
        return longer(*arguments)

    engine.version, engine._longer = 1, counted
    if tokens == 0:
        stop.set()
    with pytest.raises(StoppedEarly, match="the rollout of step 2 was stopped"):
        made.collect(2, stop=stop)
    assert engine.tokens - begun == tokens
    assert json.dumps(made.state()) == before


def test_only_groups_that_will_be_kept_count_as_enough():
    grading = Grading(uniform={100, 101, 102})
    engine = SteppingEngine(lambda prompt, sample: 4)
    made = collector(engine, grading, tries=20, prompts_per_step=3, oversample=2.0)
    made._cursor = PromptCursor(len(PROMPTS), 5, False)
    batch = made.collect(1)
    assert rows(batch) == [3, 4, 5]
    assert batch.metrics["groups_dropped"] == 3 and batch.metrics["groups_missing"] == 0


def test_a_grade_that_comes_late_stops_generation_too():
    """Responses that were carried are graded already, or soon: their grades count as those of new ones."""
    made = collector()
    made.collect(1)
    state = json.loads(json.dumps(made.state()))
    finished = [g for g in state["pending_groups"] if len(g["generations"]) == 2]
    assert state["pending_groups"]

    grading = Grading(held={100 + row for row in range(40)})
    engine = SteppingEngine(lambda prompt, sample: 30)
    resumed = collector(engine, grading, oversample=1.5, prompts_per_step=1)
    state["pending_groups"] = [
        {
            "position": 7,
            "overdue": False,
            "generations": {
                str(s): {
                    "response_ids": [107, 10 + s, STOP],
                    "logprobs": [-1.0] * 3,
                    "finish_reason": "stop",
                    "weight_version": 0,
                    "zc_logprob": None,
                    "spans": [[0, 3]],
                }
                for s in (0, 1)
            },
        }
    ]
    resumed.load_state(state)
    engine.version = 1
    made_one = engine._longer

    def longer(*arguments):
        if engine.tokens == 10:
            grading.let_go()
        return made_one(*arguments)

    engine._longer = longer
    batch = resumed.collect(2)
    assert rows(batch) == [7] and engine.tokens == 10, finished
    assert batch.metrics["groups_carried"] == 1


# spans and age -----------------------------------------------------------------------------------------------------


def test_a_resumed_response_says_which_weights_sampled_which_token():
    engine = SteppingEngine(varied)
    batches = train(collector(engine, max_staleness=9), engine, 6)
    mixed = 0
    for batch in batches:
        for sample in batch.samples():
            generation = sample.generation
            assert sum(span.tokens for span in generation.spans) == len(generation.response_ids)
            versions = [span.version for span in generation.spans]
            assert versions == sorted(set(versions)) and versions[-1] <= batch.step - 1
            assert generation.weight_version == versions[0]
            assert generation.response_ids[-1] == STOP
            assert len(generation.response_ids) == varied(
                sample.prompt_ids[0], int(generation.response_ids[1]) - 10
            )
            mixed += len(versions) > 1
    assert mixed > 0


def test_the_metrics_are_the_ages_of_all_tokens():
    engine = SteppingEngine(varied)
    for batch in train(collector(engine, max_staleness=9), engine, 6):
        ages = [
            batch.step - 1 - span.version
            for sample in batch.samples()
            for span in sample.generation.spans
            for _ in range(span.tokens)
        ]
        assert batch.metrics["staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        assert batch.metrics["staleness_max"] == max(ages)


def test_spans_without_tokens_do_not_age_a_batch():
    generation = Generation([5, STOP], [-1.0, -1.0], "stop", 0, spans=(WeightSpan(0, 0), WeightSpan(4, 2)))
    assert token_ages(generation, 5) == [(5, 0), (1, 2)]
    group = Group(PROMPTS[0], [Sample([100], generation, "", True)])
    assert staleness_metrics([group], trained_version=5) == {"staleness_mean": 1.0, "staleness_max": 1.0}
    assert staleness_metrics([], trained_version=5) == {"staleness_mean": 0.0, "staleness_max": 0.0}
    plain = Generation([5, STOP], [-1.0, -1.0], "stop", 3)
    assert token_ages(plain, 5) == [(2, 2)]


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_what_would_be_older_than_the_bound_is_generated_anew_and_then_waited_for(bound):
    engine = SteppingEngine(lambda prompt, sample: 200 if (prompt, sample) == (101, 1) else 4)
    made = collector(engine, max_staleness=bound)
    made._cursor = PromptCursor(len(PROMPTS), 5, False)
    batches = train(made, engine, bound + 3)
    assert max(batch.metrics["staleness_max"] for batch in batches) <= bound
    begun = Counter((prompt, sample) for prompt, sample, had in engine.calls if had == 0)
    assert {key for key, times in begun.items() if times > 1} == {(101, 0), (101, 1)}
    assert max(begun.values()) == 2
    # Carried over `bound` times, it would be too old in the next step, which begins it anew and waits for it.
    (found,) = [batch for batch in batches if 1 in rows(batch)]
    assert found.step == bound + 2
    spans = [
        sample.generation.spans for group in found.groups if group.prompt.row == 1 for sample in group.samples
    ]
    assert spans == [(WeightSpan(bound + 1, 4),), (WeightSpan(bound + 1, 200),)]


def test_without_oversampling_every_token_comes_from_the_weights_that_are_trained():
    engine = SteppingEngine(varied)
    for batch in train(collector(engine, oversample=1.0), engine, 4):
        assert batch.metrics["staleness_max"] == 0.0 and batch.metrics["groups_carried"] == 0
        assert {span.version for sample in batch.samples() for span in sample.generation.spans} == {
            batch.step - 1
        }


def test_weights_of_other_steps_are_refused_before_anything_is_generated():
    for ahead, version, allowed in ((0, 1, False), (0, 2, True), (0, 3, False), (1, 1, True), (1, 0, False)):
        engine = SteppingEngine(varied)
        made = collector(engine, ahead=ahead)
        engine.version = version
        if allowed:
            made.collect(3)
            continue
        expected = "expected 2 or 1" if ahead else "expected 2;"
        with pytest.raises(
            RuntimeError, match=f"step 3: the engine holds weight version {version}, {expected}"
        ):
            made.collect(3)
        assert engine.tokens == 0


# nothing is lost, nothing doubled ----------------------------------------------------------------------------------


def pending_rows(state):
    return [PROMPTS[group["position"]].row for group in state["pending_groups"]]


def test_every_prompt_is_trained_once_an_epoch_or_is_on_its_way():
    engine, grading = SteppingEngine(varied), Grading()
    made = collector(engine, grading, max_staleness=9)
    batches = train(made, engine, 6)
    used = [row for batch in batches for row in rows(batch)]
    open_ = pending_rows(made.state())
    order = [PROMPTS[p].row for p, _ in PromptCursor(len(PROMPTS), 5, True).take(len(used) + len(open_))]
    assert len(used) == 24 and sorted(used + open_) == sorted(order)
    assert max(Counter(grading.graded).values()) == 1


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(at, dropping):
    settings = dict(max_staleness=2)
    uniform = {100 + row for row in range(40) if row % 3 == 0} if dropping else set()
    if dropping:
        settings["tries"] = 12
    engine = SteppingEngine(varied)
    made = collector(engine, Grading(uniform), **settings)
    expected = train(made, engine, at)
    state = json.loads(json.dumps(made.state()))  # a checkpoint is JSON
    expected += train(made, engine, 3, first=at + 1)

    other = SteppingEngine(varied)
    resumed = collector(other, Grading(uniform), **settings)
    resumed.load_state(state)
    assert json.loads(json.dumps(resumed.state())) == state
    found = train(resumed, other, 3, first=at + 1)
    assert [rows(batch) for batch in found] == [rows(batch) for batch in expected[at:]]
    assert spans_of(found) == spans_of(expected[at:])
    assert [batch.metrics for batch in found] == [batch.metrics for batch in expected[at:]]
    assert other.seeds == engine.seeds[-len(other.seeds) :]


@pytest.mark.parametrize("token", range(1, 60, 6))
def test_progress_survives_servers_that_need_weights(token):
    """Interrupted anywhere, the step goes on with the same prompts, and asks for no finished response again."""
    engine, grading = SteppingEngine(varied), Grading()
    made = collector(engine, grading, max_staleness=9)
    train(made, engine, 1)
    engine.version = 1
    before = json.loads(json.dumps(made.state()))
    taken = engine.calls[:]
    engine.interrupt[engine.tokens + token] = WeightsNeeded("a server came back")
    interrupted = False
    try:
        batch = made.collect(2)
    except WeightsNeeded:
        interrupted = True
        assert json.loads(json.dumps(made.state())) == before  # a checkpoint now begins the step anew
        batch = made.collect(2)
    assert interrupted or engine.interrupt
    assert rows(batch) and len(rows(batch)) == 4
    used = rows(batch) + pending_rows(made.state())
    begun = {prompt - 100 for prompt, _, _ in engine.calls[len(taken) :]}
    assert len(set(used)) == len(used) and begun <= set(used)
    assert batch.metrics["prompts_tried"] == len(set(used)) - len(before["pending_groups"])
    assert max(Counter(grading.graded).values()) == 1
    resumed_at = made.state()
    assert resumed_at != before


def test_servers_that_are_lost_leave_the_state_of_before_the_step():
    engine = SteppingEngine(varied)
    made = collector(engine)
    before = json.loads(json.dumps(made.state()))
    engine.interrupt[7] = ServersLost("none left")
    with pytest.raises(ServersLost):
        made.collect(1)
    assert json.loads(json.dumps(made.state())) == before
    fresh = collector(SteppingEngine(varied))
    fresh.load_state(before)
    assert rows(fresh.collect(1)) == rows(collector().collect(1))


def test_each_round_has_what_is_left_of_the_deadline(monkeypatch):
    from megatron_laser.rollout import collector as module

    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    engine = SteppingEngine(lambda prompt, sample: 4)
    generate = engine.generate_some

    def slow(*arguments, **keywords):
        found = generate(*arguments, **keywords)
        now[0] += 25.0
        return found

    engine.generate_some = slow
    made = collector(engine, Grading(uniform={100 + row for row in range(40)}), tries=12, oversample=1.0)
    made.collect(1)
    assert engine.deadlines == [60.0, 35.0, 10.0]

    # and a step that was interrupted has what it had left
    engine.version, engine.deadlines = 1, []
    engine.interrupt[engine.tokens + 3] = WeightsNeeded("a server came back")
    with pytest.raises(WeightsNeeded):
        made.collect(2)
    now[0] += 15.0
    made.collect(2)
    assert engine.deadlines[:2] == [60.0, 45.0]


def test_enough_is_said_once_and_to_whoever_asks_later():
    stop, heard = StopEarly(), []
    stop.on_set(lambda: heard.append("early"))
    assert heard == []
    stop.set()
    stop.set()
    stop.on_set(lambda: heard.append("late"))
    assert heard == ["early", "late"]


def test_the_tries_of_a_step_follow_from_oversampling():
    assert collector(oversample=1.3, prompts_per_step=4)._tries == math.ceil(5.2)

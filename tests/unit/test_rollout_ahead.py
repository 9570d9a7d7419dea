"""Rollouts that run ahead of training: one step old, nothing lost or doubled, and who hears of a failure."""

import json
import threading
from collections import Counter

import pytest
from helpers.collecting import PROMPTS, collector, rows, spans_of, varied
from helpers.stepping_engine import Grading, SteppingEngine

from megatron_laser.rollout.ahead import RolloutAhead
from megatron_laser.rollout.client.errors import ServersLost, WeightsNeeded


def ahead(engine=None, grading=None, **settings):
    engine = engine or SteppingEngine(varied)
    made = collector(engine, grading, **dict(ahead=1, oversample=1.0) | settings)
    return RolloutAhead(made, PROMPTS)


def run_ahead(made, engine, steps, first=1, states=None):
    """The loop's order: collect, begin the next one, train, wait, sync."""
    batches = []
    for step in range(first, first + steps):
        batches.append(made.collect(step))
        made.begin(step + 1)
        made.wait(30.0)
        engine.version = step
        if states is not None:
            states.append(json.loads(json.dumps(made.state())))
    return batches


def test_a_batch_that_is_ahead_is_one_step_old_and_the_first_one_is_not():
    engine = SteppingEngine(varied)
    batches = run_ahead(ahead(engine), engine, 5)
    assert [batch.step for batch in batches] == [1, 2, 3, 4, 5]
    assert [batch.metrics["staleness_max"] for batch in batches] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert [batch.metrics["staleness_mean"] for batch in batches] == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_with_oversampling_too_the_bound_holds():
    engine = SteppingEngine(lambda prompt, sample: 60 if prompt % 3 == 0 and sample == 1 else 4)
    batches = run_ahead(ahead(engine, oversample=1.5, max_staleness=2), engine, 10)
    assert max(batch.metrics["staleness_max"] for batch in batches) == 2.0


def test_a_batch_keeps_its_own_metrics_although_the_next_one_is_collected_before_it_is_recorded():
    grading = Grading(uniform={100 + row for row in range(40) if row % 2})
    engine = SteppingEngine(varied)
    made = ahead(engine, grading, tries=12)
    tried = []
    for batch in run_ahead(made, engine, 4):
        used = len(batch.groups) + batch.metrics["groups_dropped"]
        assert batch.metrics["prompts_tried"] == used
        tried.append(used)
    assert len(set(tried)) > 1


@pytest.mark.parametrize("oversample", [1.0, 1.5])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_run_resumed_with_a_batch_ahead_sees_the_same_prompts_once(at, oversample):
    settings = dict(oversample=oversample, max_staleness=3)
    engine, states = SteppingEngine(varied), []
    expected = run_ahead(ahead(engine, **settings), engine, at + 3, states=states)
    state = states[at - 1]
    assert state["ahead"]["step"] == at + 1

    other = SteppingEngine(varied)
    other.version = at
    resumed = ahead(other, **settings)
    resumed.load_state(state)
    assert json.loads(json.dumps(resumed.state())) == state
    found = run_ahead(resumed, other, 3, first=at + 1)
    assert [rows(batch) for batch in found] == [rows(batch) for batch in expected[at:]]
    assert spans_of(found) == spans_of(expected[at:])
    assert found == expected[at:]  # texts, rewards, metrics
    taken = [row for batch in expected[:at] + found for row in rows(batch)]
    assert max(Counter(taken).values()) == 1


def test_a_checkpoint_without_a_batch_ahead_begins_the_next_step_itself():
    engine = SteppingEngine(varied)
    made = ahead(engine)
    made.collect(1)
    engine.version = 1
    state = json.loads(json.dumps(made.state()))
    assert state["ahead"] is None
    other = SteppingEngine(varied)
    other.version = 1
    resumed = ahead(other)
    resumed.load_state(state)
    assert rows(resumed.collect(2)) == rows(made.collect(2))


def test_servers_that_need_weights_while_a_batch_is_ahead_have_got_them_by_the_next_step():
    engine = SteppingEngine(varied)
    made = ahead(engine)
    first = made.collect(1)
    state = json.loads(json.dumps(made.state()))
    engine.interrupt[engine.tokens + 9] = WeightsNeeded("a server came back")
    made.begin(2)
    made.wait(30.0)
    assert json.loads(json.dumps(made.state())) == state
    engine.version = 1  # the sync that follows every step
    calls = len(engine.calls)
    batch = made.collect(2)
    assert len(rows(batch)) == 4 and not set(rows(batch)) & set(rows(first))
    assert calls < len(engine.calls) <= calls + 8
    assert batch.metrics["staleness_max"] <= 1.0


def test_lost_servers_come_out_of_the_next_collect_and_not_of_the_thread():
    engine = SteppingEngine(varied)
    made = ahead(engine)
    made.collect(1)
    state = json.loads(json.dumps(made.state()))
    engine.interrupt[engine.tokens + 9] = ServersLost("none left")
    made.begin(2)
    made.wait(30.0)
    engine.version = 1
    assert json.loads(json.dumps(made.state())) == state
    with pytest.raises(ServersLost, match="none left"):
        made.collect(2)
    assert len(rows(made.collect(2))) == 4  # servers came back: it goes on


def test_a_batch_is_begun_once_and_waiting_for_it_has_a_deadline():
    engine, gate = SteppingEngine(varied), threading.Event()
    made = ahead(engine)
    generate = engine.generate_some
    running = []

    def gated(*arguments, **keywords):
        running.append(threading.current_thread().name)
        assert gate.wait(30)
        return generate(*arguments, **keywords)

    engine.generate_some = gated
    made.wait(0.0)  # nothing is collected
    made.begin(1)
    made.begin(1)
    with pytest.raises(
        TimeoutError, match=r"the rollout of step 1, ahead of training, took more than 0\.05 s"
    ):
        made.wait(0.05)
    gate.set()
    made.wait(30.0)
    made.begin(1)  # it is there
    made.wait(30.0)
    assert running == ["rollout of step 1"] and made.collect(1).step == 1
    made.close()


def rows_of_state(state):
    ahead = [] if state["ahead"] is None else state["ahead"]["groups"]
    return [group["position"] for group in (*ahead, *state["pending_groups"])]


@pytest.mark.parametrize(("samples", "is_ahead"), [(3, True), (2, False), (3, False)])
def test_what_was_begun_with_other_sampling_or_for_nobody_is_generated_anew(samples, is_ahead):
    """A run goes on with groups of 3 in place of 2, or without rollout.ahead: no prompt is lost or taken twice, and the
    same sampling keeps what was carried."""
    engine, states = SteppingEngine(varied), []
    before = run_ahead(ahead(engine, oversample=1.5, max_staleness=3), engine, 2, states=states)
    state = states[-1]
    begun = rows_of_state(state)
    kept = [group for group in state["pending_groups"] if group["generations"]]
    assert state["ahead"] is not None and kept

    other = SteppingEngine(varied)
    other.version = 2
    made = collector(other, ahead=int(is_ahead), oversample=1.5, max_staleness=3, samples=samples)
    resumed = RolloutAhead(made, PROMPTS) if is_ahead else made
    resumed.load_state(state)
    now = resumed.state() | ({} if is_ahead else {"ahead": None})
    assert now["ahead"] is None and rows_of_state(now) == begun
    carried = [group for group in now["pending_groups"] if group["generations"]]
    assert carried == (kept if samples == 2 else [])
    found = [resumed.collect(3), resumed.collect(4)] if is_ahead else [made.collect(3)]
    assert {len(group.samples) for batch in found for group in batch.groups} == {samples}
    taken = [row for batch in before[:2] + found for row in rows(batch)]
    assert max(Counter(taken).values()) == 1
    assert set(begun) <= set(taken) | set(rows_of_state(resumed.state() | {"ahead": None}))

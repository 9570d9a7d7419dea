"""A step's collection over servers that are stopped early or lose their weights: kept, resumed, counted once."""

import time
from collections import Counter
from concurrent.futures import Future

import pytest
from helpers.faulty_server import HELD, SCORE, STOP, FaultyServer, open_engine

from megatron_laser.data import PromptCursor
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import Grade, GradingPoolError
from megatron_laser.rollout.client import fleet
from megatron_laser.rollout.client.errors import ServersLost, WeightsNeeded
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.rollout.pending import array_from
from megatron_laser.run.engines import NEEDS_WEIGHTS, call_engine
from megatron_laser.types import Prompt, SamplingParams, WeightSpan

PROMPTS = [Prompt(row, "", str(row), [4, 2 + row % 3, 3 + row // 3]) for row in range(9)]


class Grading:
    """Counts what is graded, by (answer of the prompt, text)."""

    def __init__(self):
        self.graded = Counter()

    def submit(self, text, answer, facts=None):
        self.graded[answer, text] += 1
        future = Future()
        future.set_result(Grade(1.0, "correct"))
        return future


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fleet, "PROBE_EVERY", 0.05)
    made = FaultyServer()
    yield made
    made.stop()


@pytest.fixture
def engine(server):
    made = open_engine(server, max_concurrency_per_server=5)
    made.update_weights([], 0)
    yield made
    made.close()


def collector(engine, grading, *, oversample=1.0, samples=1, score=None, max_staleness=2):
    return RolloutCollector(
        engine,
        grading,
        PROMPTS,
        PromptCursor(len(PROMPTS), 0, False),
        sampling=SamplingParams(samples, 8, (STOP,), score_token_id=score),
        prompts_per_step=3,
        decode=lambda ids: " ".join(map(str, ids)),
        deadline=30.0,
        seed=0,
        timers=Timers(),
        oversample=oversample,
        max_staleness=max_staleness,
    )


def rows(batch):
    return [group.prompt.row for group in batch.groups]


def hold(server, wanted):
    """Hold the requests whose prompt is that of a row in `wanted`, until they are aborted."""
    held = [PROMPTS[row].token_ids for row in wanted]
    server.holds = lambda body: body["input_ids"][:3] in held


def test_what_is_unfinished_when_enough_is_there_is_aborted_kept_and_resumed(server, engine):
    grading = Grading()
    made = collector(engine, grading, oversample=5 / 3)
    hold(server, (1, 3))  # of 5 prompts that are begun for 3
    first = made.collect(1)
    assert rows(first) == [0, 2, 4]
    held = [body for body in server.requests if server.holds(body)]
    assert {body["rid"] for body in held} == set(server.aborted) and len(held) == 2
    assert made.metrics["groups_carried"] == 2 and made.metrics["prompts_tried"] == 5
    pending = made.state()["pending_groups"]
    assert [group["position"] for group in pending] == [1, 3]
    for group in pending:
        assert group["generations"]["0"]["finish_reason"] == "abort"
        assert array_from(group["generations"]["0"]["response_ids"]).tolist() == [7, 8] and HELD == 2

    server.holds = lambda body: False
    engine.update_weights([], 1)
    asked = len(server.requests)
    second = made.collect(2)
    assert rows(second)[:2] == [1, 3]
    resumed = [body["input_ids"] for body in server.requests[asked:] if len(body["input_ids"]) > 3]
    assert sorted(resumed) == sorted([*PROMPTS[row].token_ids, 7, 8] for row in (1, 3))
    for group in second.groups[:2]:
        (sample,) = group.samples
        assert (
            sample.generation.response_ids.tolist() == [7, 8, 9, STOP]
            and len(sample.generation.logprobs) == 4
        )
        assert sample.generation.spans == (WeightSpan(0, 2), WeightSpan(1, 2))
        assert sample.generation.weight_version == 0
    assert made.metrics["staleness_max"] == 1.0
    taken = rows(first) + rows(second)
    assert len(set(taken)) == len(taken)
    assert set(grading.graded.values()) == {1}


def test_a_carried_response_that_would_be_too_old_is_generated_anew(server, engine):
    made = collector(engine, Grading(), oversample=4 / 3, max_staleness=0)
    hold(server, (1,))
    assert rows(made.collect(1)) == [0, 2, 3]
    server.holds = lambda body: False
    engine.update_weights([], 1)
    batch = made.collect(2)
    (sample,) = batch.groups[0].samples
    assert rows(batch)[0] == 1 and sample.generation.spans == (WeightSpan(1, 4),)


def test_carried_responses_survive_a_checkpoint(server, engine):
    made = collector(engine, Grading(), oversample=5 / 3)
    hold(server, (1, 3))
    made.collect(1)
    grading = Grading()
    resumed = collector(engine, grading, oversample=5 / 3)
    resumed.load_state(made.state())
    server.holds = lambda body: False
    engine.update_weights([], 1)
    assert rows(resumed.collect(2)) == [1, 3, 5]
    assert all(count == 1 for count in grading.graded.values())


@pytest.mark.parametrize("score", [None, SCORE], ids=["", "scored by the server"])
def test_a_step_goes_on_after_its_servers_were_given_weights_again(server, engine, score):
    grading = Grading()
    made = collector(engine, grading, samples=4, score=score)
    before = made.state()

    def graded_soon():
        """On a busy machine the server is ahead of who grades; its requests then wait a little."""
        until = time.monotonic() + 2.0
        while not grading.graded and time.monotonic() < until:
            time.sleep(0.01)
        return bool(grading.graded)

    def restart(body):
        if server.answered >= 8 and graded_soon():
            server.version = "default"  # as a new process that holds the weights of the model folder
        return False

    server.holds = restart
    with pytest.raises(WeightsNeeded, match=f"servers came back without the current weights: {server.url}"):
        made.collect(1)
    done = sum(grading.graded.values())
    assert 0 < done < 12
    assert made.state() == before  # a checkpoint now begins the step anew
    server.holds = lambda body: False
    engine.update_weights([], 0)
    asked = len(server.generations)
    batch = made.collect(1)
    assert rows(batch) == [0, 1, 2] and made.metrics["prompts_tried"] == 3
    assert len(server.generations) - asked == 12 - done  # what had arrived is not asked for again
    assert sum(grading.graded.values()) == 12
    samples = list(batch.samples())
    assert all(s.generation.response_ids.tolist() == [7, 8, 9, STOP] and s.reward == 1.0 for s in samples)
    assert {s.zc_logprob for s in samples} == {None if score is None else -7.5}


def test_the_run_is_told_what_to_do_about_each_kind_of_trouble(caplog):
    def fails(error):
        def work():
            raise error

        return work

    assert call_engine("rollout", lambda: None) == ""
    assert call_engine("rollout", fails(WeightsNeeded("server X"))) == NEEDS_WEIGHTS
    assert "rollout: server X" in caplog.text
    for error in (ServersLost("server X"), TimeoutError("server X"), GradingPoolError("server X")):
        assert call_engine("rollout of step 3", fails(error)) == "rollout of step 3: server X"
    with pytest.raises(KeyError):
        call_engine("rollout", fails(KeyError("a fault of ours")))

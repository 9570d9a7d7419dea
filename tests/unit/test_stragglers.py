"""Slow ranks are found by comparing every rank's seconds per phase with the median."""

from megatron_laser.observability.timers import Timers
from megatron_laser.trainer import stragglers
from megatron_laser.trainer.stragglers import Stragglers, slow_ranks, straggler_metrics, time_reductions


def test_even_ranks_give_no_line():
    assert slow_ranks([{"time/train": 10.0}, {"time/train": 10.9}, {"time/train": 11.0}], 50) is None


def test_the_slowest_rank_is_named_for_every_phase_it_is_slow_in():
    ranks = [{"time/train": 10.0, "time/sync": 2.0}] * 3 + [{"time/train": 12.1, "time/sync": 2.1}]
    line = "slow ranks over the last 50 steps: train rank 3: 12.10 s, median 10.00 s"
    assert slow_ranks(ranks, 50) == line


def test_a_difference_of_a_moment_is_noise():
    assert slow_ranks([{"time/logprob": 0.1}, {"time/logprob": 0.4}], 50) is None


def test_the_metric_is_the_slowest_rank_over_the_median_of_all():
    ranks = [{"time/train": seconds, "time/sync": 0.0} for seconds in (10.0, 10.0, 12.0, 25.0)]
    assert straggler_metrics(ranks) == {"straggler/train": 25.0 / 11.0}, (
        "a phase that takes no time has no ratio"
    )


class TwoRanks:
    """Of which the other one takes twice as long, outside the reduction."""

    world_size, cpu_group, is_main = 2, None, True

    @staticmethod
    def all_gather_object(gathered, own, group):
        gathered[:] = [own, {phase: seconds * 2 for phase, seconds in own.items()}]


def test_ranks_are_compared_every_few_steps_over_the_seconds_since_then(monkeypatch, caplog):
    monkeypatch.setattr(stragglers.dist, "all_gather_object", TwoRanks.all_gather_object)
    compared = Stragglers(TwoRanks(), every=3)
    times = {"time/train": 5.0, "time/reduce": 1.0, "time/logprob": 0.0}
    found = [compared.add(step, times) for step in range(1, 7)]
    assert found == [{}, {}, {"straggler/train": 24.0 / 18.0}] * 2
    assert caplog.text.count("slow ranks over the last 3 steps: train rank 1: 24.00 s, median 18.00 s") == 2
    assert compared.add(7, times) == compared.add(8, times | {"time/logprob": 3.0}) == {}
    assert compared.add(9, times) == {"straggler/train": 24.0 / 18.0, "straggler/logprob": 6.0 / 4.5}


class OneRank:
    world_size = 1


def test_one_rank_compares_nothing():
    alone = Stragglers(OneRank(), every=1)
    assert alone.add(1, {"time/train": 1.0}) == {}


class Policy:
    class chunks:
        class config:
            finalize_model_grads_func = None


def test_the_gradient_reduction_is_a_phase_of_its_own():
    ticks = iter(range(100))
    timers = Timers(clock=lambda: float(next(ticks)))
    called = []
    Policy.chunks.config.finalize_model_grads_func = lambda *arguments, **named: called.append(
        (arguments, named)
    )
    time_reductions(Policy, timers)
    Policy.chunks.config.finalize_model_grads_func(1, tokens=2)
    assert called == [((1,), {"tokens": 2})]
    assert timers.collect() == {"time/reduce": 1.0}

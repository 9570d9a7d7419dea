"""Slow ranks are found by comparing every rank's seconds per phase with the median."""

from megatron_laser.observability.timers import Timers
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


class OneRank:
    world_size = 1


def test_one_rank_compares_nothing():
    stragglers = Stragglers(OneRank(), every=1)
    assert stragglers.add(1, {"time/train": 1.0}) == {}


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

"""The live view and the plain lines that stand in for it."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from megatron_laser.observability.alarms import Alarm
from megatron_laser.observability.live_view import (
    LiveView,
    format_count,
    format_duration,
    plain_line,
    sparkline,
    time_shares,
)

METRICS = {
    "reward_mean": 0.512,
    "self_reward_f1": 0.61,
    "self_reward_auroc": float("nan"),
    "policy_loss": 0.0123,
    "grad_norm": 1.25,
    "time/tokens_per_second": 12345.0,
    "time/generate": 0.3,
    "time/train": 0.1,
    "time/total": 0.5,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(*, terminal: bool = False, width: int = 200) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=width, highlight=False), text


def run_lines(mode: Any, seconds_per_step: float, steps: int = 10, **extra: Any) -> list[str]:
    output, text = console()
    clock = Clock()
    with LiveView(steps, mode, console=output, clock=clock) as view:
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            view.update(step, METRICS | (extra if step == 5 else {}))
    return text.getvalue().splitlines()


def test_without_a_terminal_every_slow_step_is_a_plain_line() -> None:
    lines = run_lines("auto", seconds_per_step=3.0)
    assert [line.split()[1] for line in lines] == [f"{step}/10" for step in range(1, 11)]
    assert "\x1b" not in "".join(lines)


def test_fast_steps_are_thinned_but_first_and_last_are_printed() -> None:
    lines = run_lines("off", seconds_per_step=0.5)
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]


def test_an_evaluation_is_always_printed() -> None:
    lines = run_lines("off", seconds_per_step=0.01, **{"eval/accuracy": 0.75})
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "10/10"]
    assert "| eval accuracy 0.750" in lines[1]


def test_a_step_that_dropped_groups_says_how_often_the_policy_was_right_on_all_that_it_tried() -> None:
    tried = {"accuracy_tried": 0.25, "groups_dropped_right": 1, "groups_dropped_wrong": 9}
    line = plain_line(7, 100, METRICS | tried | {"groups_dropped": 10})
    assert "reward 0.512  of all tried 0.250 (dropped 1 all right, 9 all wrong)  F1 0.610" in line
    assert plain_line(7, 100, METRICS | tried | {"groups_dropped": 0}) == plain_line(7, 100, METRICS)


def test_a_step_says_how_many_responses_could_not_be_graded_when_there_are_any() -> None:
    assert "  not graded 3  " in plain_line(7, 100, METRICS | {"grading_failed": 3})
    assert plain_line(7, 100, METRICS | {"grading_failed": 0}) == plain_line(7, 100, METRICS)


def test_a_line_names_what_is_there_and_leaves_out_what_is_not() -> None:
    line = plain_line(7, 100, METRICS)
    assert line == (
        "step   7/100  reward 0.512  F1 0.610  policy 0.0123  grad 1.25  12.3k tok/s  "
        "0.50 s (generate 75%, train 25%)"
    )


def test_a_line_says_what_the_servers_scores_cost() -> None:
    line = plain_line(7, 100, METRICS | {"rollout/score_time_fraction": 0.0064})
    assert line.endswith("0.50 s (generate 75%, train 25%, scores 0.6% of the requests' time)")


def test_remaining_time_follows_the_pace_and_not_the_first_evaluation() -> None:
    output, text = console()
    clock = Clock()
    with LiveView(12, "off", console=output, clock=clock) as view:
        clock.now += 1000.0
        view.update(0, {"test/accuracy": 0.1})
        for step in (1, 2):
            clock.now += 6.0
            view.update(step, METRICS)
    first, *_, last = text.getvalue().splitlines()
    assert "eta" not in first
    assert "test accuracy 0.100" in first
    assert last.endswith("eta 1m00s")


def test_the_live_view_shows_progress_numbers_and_time() -> None:
    output, text = console(terminal=True)
    with LiveView(10, "on", console=output) as view:
        for step in range(1, 5):
            view.update(step, METRICS | {"reward_mean": step / 10, "eval/accuracy": 0.75})
        view.message("checkpoint [written]")
    shown = text.getvalue()
    for part in ("4/10", "40%", "0.610", "12.3k tok/s", "generate 75%", "0.750", "▁▃▆█", "0.10 to 0.40"):
        assert part in shown
    assert "checkpoint [written]" in shown


def test_the_live_view_names_the_alarms_that_are_on_and_no_longer_those_that_are_over() -> None:
    output, text = console(terminal=True)
    alarm = Alarm("truncated", 3, None, "many responses are cut", "message", "place", 0.7, 0.5)
    with LiveView(10, "on", console=output) as view:
        view.update(4, METRICS)
        view.show_alarms([alarm])
    assert "many responses are cut (step 3)" in text.getvalue()
    output, text = console(terminal=True)
    with LiveView(10, "on", console=output) as view:
        view.show_alarms([alarm])
        view.show_alarms([])
        view.update(4, METRICS)
    assert "alarms" not in text.getvalue().splitlines()[-12:]


def test_the_live_view_survives_a_narrow_terminal_and_missing_metrics() -> None:
    output, text = console(terminal=True, width=40)
    with LiveView(10, "on", console=output) as view:
        view.update(1, {})
        view.update(2, METRICS)
    assert "2/10" in text.getvalue()


def test_an_update_costs_less_than_a_millisecond() -> None:
    output, _ = console(terminal=True)
    with LiveView(3000, "on", console=output) as view:
        costs: list[float] = []
        for step in range(1, 501):
            started = time.perf_counter()
            view.update(step, METRICS)
            costs.append(time.perf_counter() - started)
    assert sorted(costs)[len(costs) // 2] < 1e-3


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logging\.live is 'yes'; expected auto, on or off"):
        LiveView(1, "yes")  # type: ignore[arg-type]


def test_time_shares_add_up_to_one() -> None:
    assert sum(share for _, share in time_shares(METRICS)) == pytest.approx(1.0)
    assert time_shares({}) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4s"), (59.6, "1m00s"), (3725, "1h02m"), (90000, "1d01h"), (86399.9, "1d00h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts() -> None:
    assert [format_count(value) for value in (842, 12345, 4.56e6)] == ["842", "12.3k", "4.56M"]


def test_a_sparkline_spans_the_values_and_keeps_its_width() -> None:
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 48)) == 48
    assert sparkline([0, 1], 2, ascii_only=True).isascii()


def test_further_readouts_are_shown_in_the_lines_and_in_the_view() -> None:
    read = {
        "readout/prefix/128/auroc": 0.714,
        "readout/prefix/128/loss": 0.1234,
        "readout/prefix/128/points": 9.0,
    }
    line = plain_line(3, 10, METRICS | read)
    assert "| prefix/128 AUROC 0.714 prefix/128 loss 0.1234" in line
    assert "points" not in line and "prefix" not in plain_line(3, 10, METRICS)
    output, text = console(terminal=True)
    with LiveView(10, "on", console=output) as view:
        view.update(3, METRICS | read)
    assert "readouts" in text.getvalue() and "prefix/128 AUROC" in text.getvalue()

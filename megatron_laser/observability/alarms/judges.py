"""What one step's metrics say about one alarm: beyond its limit or not, or nothing at all.

A judge is called with each row of metrics.jsonl in turn and may remember earlier ones, such as the early level. It
returns None for a row that says nothing about it: an evaluation's, one without the metric, one where it is NaN.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_laser.rewards.grade import FAILED_OUTCOMES, OUTCOMES

Row = Mapping[str, Any]
Reading = Callable[[Row], float | None]

NOT_UP = 0.02  # a share of right responses that is up by less is not up
HIGH_SCORE = 0.6  # of wrong responses
SMALL_MISMATCH = 0.005  # nats; what float32 on both sides stays far below and bfloat16 near
_SCORED = 0.25  # share of responses with a score, below which the spread of scores says nothing


class Judged(NamedTuple):
    """bad: beyond the limit. value: what was compared. before: the early or best level. what: which of several."""

    bad: bool
    value: float
    limit: float
    before: float | None = None
    what: str = ""


Judge = Callable[[Row], Judged | None]


def finite(row: Row, name: str) -> float | None:
    """The metric as a finite float; None where it is missing, null, NaN or a list."""
    value = row.get(name)
    if value is None or isinstance(value, (str, list, tuple)):
        return None
    number: float = value if type(value) is float else float(value)
    return number if math.isfinite(number) else None


class Early:
    """The level of the first readings: their median, once there are enough."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._first: list[float] = []
        self.level: float | None = None

    def __call__(self, value: float) -> float | None:
        """The level, None while readings still count towards it; `value` is one of these then."""
        if self.level is not None:
            return self.level
        self._first.append(value)
        if len(self._first) == self._count:
            self.level = statistics.median(self._first)
        return None


def metric(name: str) -> Reading:
    """Reads one metric."""
    return lambda row: finite(row, name)


def above(read: Reading, limit: float) -> Judge:
    """Beyond is a reading of more than `limit`."""

    def judge(row: Row) -> Judged | None:
        value = read(row)
        return None if value is None else Judged(value > limit, value, limit)

    return judge


def at_least(read: Reading, limit: float) -> Judge:
    """Beyond is a reading of `limit` or more."""

    def judge(row: Row) -> Judged | None:
        value = read(row)
        return None if value is None else Judged(value >= limit, value, limit)

    return judge


def below(read: Reading, limit: float) -> Judge:
    """Beyond is a reading of less than `limit`."""

    def judge(row: Row) -> Judged | None:
        value = read(row)
        return None if value is None else Judged(value < limit, value, limit)

    return judge


def grown(read: Reading, factor: float, early_steps: int, floor: float = 0.0) -> Judge:
    """Beyond is a reading above `factor` times the early level, and above `floor`."""

    def compare(value: float, level: float) -> Judged:
        limit = max(factor * level, floor)
        return Judged(value > limit, value, limit, level)

    return _against_early(read, early_steps, compare)


def shrunk(read: Reading, share: float, early_steps: int) -> Judge:
    """Beyond is a reading below `share` of the early level."""
    return _against_early(
        read, early_steps, lambda value, level: Judged(value < share * level, value, share * level, level)
    )


def _against_early(read: Reading, early_steps: int, compare: Callable[[float, float], Judged]) -> Judge:
    """`compare` is asked with a reading and the early level, once there is one."""
    early = Early(early_steps)

    def judge(row: Row) -> Judged | None:
        value = read(row)
        level = None if value is None else early(value)
        return None if value is None or level is None else compare(value, level)

    return judge


def positive(read: Reading) -> Reading:
    """Without zeros: a step whose groups are all uniform has no gradient, which says nothing about those that have."""

    def reading(row: Row) -> float | None:
        value = read(row)
        return value if value is not None and value > 0.0 else None

    return reading


def right_share(row: Row) -> float | None:
    """Share of right rollouts, among everything that was graded where that is known (groups may be dropped)."""
    tried = finite(row, "accuracy_tried")
    return finite(row, "reward_mean") if tried is None else tried


def graded_share(*outcomes: str) -> Reading:
    """Share of these outcomes among the responses that the grader had a verdict on."""
    verdicts = [name for name in OUTCOMES if name not in FAILED_OUTCOMES]

    def reading(row: Row) -> float | None:
        counts = {name: finite(row, f"outcome/{name}") or 0.0 for name in verdicts}
        total = sum(counts.values())
        return sum(counts[name] for name in outcomes) / total if total else None

    return reading


def failed_share(prefix: str, names: tuple[str, ...]) -> Reading:
    """Share of what failed, the sum of `prefix` + name, among all responses of the step, failed ones too."""

    def reading(row: Row) -> float | None:
        found = [finite(row, prefix + name) for name in names]
        if all(value is None for value in found):
            return None
        failed = sum(value or 0.0 for value in found)
        made = sum(finite(row, f"outcome/{name}") or 0.0 for name in OUTCOMES if name not in FAILED_OUTCOMES)
        return failed / (made + failed) if made + failed else None

    return reading


def uniform_share(row: Row) -> float | None:
    """Share of uniform groups among those that were tried, dropped ones too."""
    share = finite(row, "groups_uniform_fraction")
    tried, dropped = finite(row, "prompts_tried"), finite(row, "groups_dropped")
    if share is None or not tried or not dropped:
        return share
    kept = max(0.0, tried - dropped)
    return (share * kept + dropped) / (kept + dropped)


def unscored_share(row: Row) -> float | None:
    """Share of responses without a score; None without LaSeR, whose runs have a loss of the score or its error."""
    scored = finite(row, "scored_fraction")
    with_laser = "self_reward_loss" in row or "self_reward_error" in row
    return 1.0 - scored if scored is not None and with_laser else None


def servers_idle_share(row: Row) -> float | None:
    """Share of the step in which servers have nothing to do, where they are on GPUs of their own."""
    if not _two_sides(row):
        return None
    idle = finite(row, "idle/servers")
    used = finite(row, "servers/utilisation")
    return 1.0 - used if idle is None and used is not None else idle


def trainer_idle_share(row: Row) -> float | None:
    """Share of the step in which the trainer waits for rollouts, where servers on other GPUs make them."""
    return finite(row, "idle/trainer") if _two_sides(row) else None


def _two_sides(row: Row) -> bool:
    """Whether servers generate, and not in turns with the trainer on the same GPUs, where one of them always waits."""
    return "rollout/servers" in row and "time/turns" not in row


def distance(read: Reading) -> Reading:
    """How far a reading is from 0."""

    def reading(row: Row) -> float | None:
        value = read(row)
        return None if value is None else abs(value)

    return reading


def once_trained(patience: int, judge: Judge) -> Judge:
    """Silent until scores have been trained for `patience` steps.

    Before their loss is trained the same number is called `self_reward_error`.
    """
    trained = 0

    def patient(row: Row) -> Judged | None:
        nonlocal trained
        if finite(row, "self_reward_loss") is None:
            return None
        trained += 1
        return judge(row) if trained > patience else None

    return patient


def anew_once_trained(make: Callable[[], Judge]) -> Judge:
    """Another judge, with an early level of its own, from the first step in which scores are trained.

    That loss joins in after `laser.reasoning_warmup_steps`, and brings gradients of another size.
    """
    judge, trained = make(), False

    def in_stages(row: Row) -> Judged | None:
        nonlocal judge, trained
        if not trained and finite(row, "self_reward_loss") is not None:
            judge, trained = make(), True
        return judge(row)

    return in_stages


def flat_scores(limit: float) -> Judge:
    """Beyond is one value for all: no distance between right and wrong, and no spread in either."""

    def judge(row: Row) -> Judged | None:
        right, wrong = finite(row, "score_right_mean"), finite(row, "score_wrong_mean")
        spreads = finite(row, "score_right_std"), finite(row, "score_wrong_std")
        # The spread of a single response is 0.
        if right is None or wrong is None or (finite(row, "scored_fraction") or 0.0) < _SCORED:
            return None
        value = max(abs(right - wrong), *(spread or 0.0 for spread in spreads))
        return Judged(value < limit, value, limit)

    return judge


def score_middle(row: Row) -> float | None:
    """The middle between the mean scores of right and of wrong responses, less 1/2."""
    right, wrong = finite(row, "score_right_mean"), finite(row, "score_wrong_mean")
    return None if right is None or wrong is None else (right + wrong) / 2 - 0.5


def up_without_accuracy(read: Reading, rise: float, early_steps: int, at_least_now: float = 0.0) -> Judge:
    """Beyond is a reading that is up by `rise` against its early level while the share of right responses is not."""
    early, early_right = Early(early_steps), Early(early_steps)

    def judge(row: Row) -> Judged | None:
        value, right = read(row), right_share(row)
        if value is None or right is None:
            return None
        level, right_level = early(value), early_right(right)
        if level is None or right_level is None:
            return None
        limit = max(level + rise, at_least_now)
        bad = value >= limit and right < right_level + NOT_UP
        return Judged(bad, value, limit, level, f"share of right ones {right:.1%}, early {right_level:.1%}")

    return judge


def accuracy_fall(fall: float, early_steps: int) -> Judge:
    """Beyond is a share of right responses that is `fall` below its early level."""
    return _against_early(
        right_share,
        early_steps,
        lambda value, level: Judged(value <= level - fall, value, level - fall, level),
    )


def validation_fall(fall: float, window: int, early_steps: int) -> Judge:
    """Beyond is an evaluation `fall` below the best so far, while rollouts are as often right as then or more often."""
    recent: deque[float] = deque(maxlen=window)
    early = Early(early_steps)
    best, right_at_best = -math.inf, None

    def judge(row: Row) -> Judged | None:
        nonlocal best, right_at_best
        right = right_share(row)
        if right is not None:
            recent.append(right)
            early(right)
        value = finite(row, "eval/accuracy")
        if value is None:
            return None
        now = statistics.median(recent) if recent else None
        then = early.level if right_at_best is None else right_at_best
        if value >= best:
            best, right_at_best = value, now
        bad = value <= best - fall and now is not None and then is not None and now >= then
        what = "" if now is None or then is None else f"share of right rollouts {now:.1%}, then {then:.1%}"
        return Judged(bad, value, best - fall, best, what)

    return judge


def more_deaths(row_name: str) -> Judge:
    """Beyond is a step in which a count went up that begins anew with each start of the run."""
    last = 0.0

    def judge(row: Row) -> Judged | None:
        nonlocal last
        value = finite(row, row_name)
        if value is None:
            return None
        new = value - last if value >= last else value
        last = value
        return Judged(new > 0, value, 1.0)

    return judge


def worst_phase(prefix: str, factor: float, smallest: float) -> Judge:
    """Beyond is a ratio `prefix`<phase> above `factor`, of the worst phase.

    Phases below `smallest` of the step's time are left out: their ratios are noise.
    """

    def judge(row: Row) -> Judged | None:
        total = finite(row, "time/total")
        worst: tuple[float, str] | None = None
        for name in row:
            if not name.startswith(prefix):
                continue
            phase = name.removeprefix(prefix)
            ratio, seconds = finite(row, name), finite(row, f"time/{phase}")
            small = total is not None and seconds is not None and seconds < smallest * total
            if ratio is None or small:
                continue
            if worst is None or ratio > worst[0]:
                worst = ratio, phase
        return None if worst is None else Judged(worst[0] > factor, worst[0], factor, None, worst[1])

    return judge

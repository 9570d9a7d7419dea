"""Section `alarms`: from where on a run says that something is wrong with it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, model_validator

from megatron_laser.config.schema.fields import (
    RUNNING,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Section,
)


def _growth(value: float) -> float:
    if 0.0 < value <= 1.0:
        raise ValueError("expected a factor above 1, or 0 or null for off")
    return value


Growth = Annotated[NonNegative, AfterValidator(_growth)]


class AlarmSettings(Section):
    """Alarms: what the metrics of a run say is wrong with it, in words ([the table](observing.md#alarms)). They are
    printed, shown in the live view and the report, and change nothing else. Each has a limit of its own, by its name;
    null or 0 switches it off."""

    changing = RUNNING

    enabled: bool = True
    """Whether there are alarms at all."""
    window: Count = 20
    """Steps that are looked at together, so that one odd step is no alarm."""
    needed: Count = 14
    """So many of the last `window` steps have to be beyond a limit. The alarm is over when half as many are."""
    early_steps: Count = 20
    """The run's first steps, whose median is the early level that some limits are relative to; nothing is judged by
    these before. Of scores the first steps after `score_patience`."""
    score_patience: CountOrZero = 100
    """Steps in which scores are trained before they are judged."""

    score_collapse: Fraction | None = 0.55
    """AUROC of the score below this: right and wrong responses get the same."""
    score_flat: NonNegative | None = 0.02
    """Right and wrong responses have mean scores within this of each other, and spreads (std) below it: one value
    for all. On the scale on which 1 is right and 0 wrong."""
    score_shift: NonNegative | None = 0.4
    """The middle between the mean scores of right and wrong responses is this far from 1/2."""
    entropy_collapse: Fraction | None = 0.1
    """Entropy below this share of its early level."""
    length_growth: Growth | None = 4.0
    """Mean response length above this many times its early level."""
    length_shrink: Fraction | None = 0.4
    """Mean response length below this share of its early level."""
    truncated: Fraction | None = 0.5
    """Share of responses that did not end by themselves; null for an environment that ends them."""
    unscored: Fraction | None = 0.5
    """With LaSeR: share of responses without a score."""
    no_end: CountOrZero | None = 10
    """So many steps in a row in which not one response ended by itself; null for an environment that ends them all."""
    unreadable: Fraction | None = 0.25
    """Share of graded responses whose answer could not be compared with the reference (outcome unparsable)."""
    hacking_format: Fraction | None = 0.15
    """The share of responses with an answer that can be judged is up by this against its early level, the share of
    right ones is not."""
    hacking_score: NonNegative | None = 0.2
    """The mean score of wrong responses is above 0.6 and up by this against its early level, the share of right
    responses is not up."""
    hacking_validation: Fraction | None = 0.1
    """Accuracy on the validation split is this far below its best, while that of the rollouts is not lower than then;
    in 2 of 3 evaluations."""
    accuracy_fall: Fraction | None = 0.15
    """The share of right rollouts is this far below its early level."""
    mismatch: NonNegative | None = 0.05
    """Mean absolute difference between the engine's log-probs and the trainer's on the same tokens, in nats."""
    mismatch_kl: NonNegative | None = 0.01
    """k3 estimate of the KL between engine and trainer on the same weights, in nats."""
    mismatch_growth: Growth | None = 5.0
    """The difference of log-probs above this many times its early level, and above 0.005 nats."""
    c_ref_drift: NonNegative | None = 2.0
    """With a reference model and `laser.drift_every`: how far the mean of log pi_ref(z_c) behind the policy's own
    responses is from c_ref, in nats, in 2 of 3 measurements. Times `laser.beta` it is the error of the scores."""
    uniform_groups: Fraction | None = 0.95
    """Share of groups whose responses all have the same reward, those counted that `rollout.drop_uniform_groups`
    left out."""
    gradient_explosion: Growth | None = 10.0
    """Gradient norm above this many times its early level, in 3 of 5 steps. The level is taken anew when the loss of
    the score joins in."""
    skipped_steps: CountOrZero | None = 1
    """So many of the last `window` steps had an update that was skipped because something was not finite."""
    failed_gradings: Fraction | None = 0.05
    """Share of responses whose grading failed (timeout or crash)."""
    failed_functions: Fraction | None = 0.1
    """Share of samples that `rollout.function` did not make."""
    server_deaths: CountOrZero | None = 1
    """So many of the last `window` steps had a server die."""
    servers_idle: Fraction | None = 0.8
    """Share of the step in which the servers have nothing to do. For servers on GPUs of their own, like the next."""
    trainer_idle: Fraction | None = 0.8
    """Share of the step in which the trainer waits for rollouts."""
    straggler: Growth | None = 1.5
    """The slowest rank takes this many times the median of all in a phase that is a twentieth of the step or more, in
    2 of 3 comparisons (`logging.straggler_every`)."""

    @model_validator(mode="after")
    def _fit_the_window(self) -> AlarmSettings:
        for name in ("needed", "skipped_steps", "server_deaths"):
            value = getattr(self, name)
            if value and value > self.window:
                raise ValueError(
                    f"alarms.{name} is {value} of the last alarms.window {self.window} steps, which never happens; "
                    "lower it or raise alarms.window"
                )
        return self

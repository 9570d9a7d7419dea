"""What a dry run says about the readouts: what is read, towards what it is trained, and what it does to advantages."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_laser.config.derived import mixing_first_step, self_reward_first_step
from megatron_laser.config.readouts import Readout, readouts
from megatron_laser.config.schema.root import RunConfig

Line = tuple[str, bool, str]


def readout_features(config: RunConfig) -> Iterator[Line]:
    """(name, whether it is on, detail): one line for each of `laser.readouts`, or two of LaSeR as published."""
    laser = config.laser
    if laser.enabled and laser.readouts is not None:
        for readout in readouts(config):
            yield _line(readout, config)
        return
    yield _scheduled("self-reward loss", self_reward_first_step(config), config, f"alpha {laser.alpha:g}")
    yield _scheduled("self-reward advantages", mixing_first_step(config), config, f"tau {laser.tau:g}")


def _line(readout: Readout, config: RunConfig) -> Line:
    tokens = ", ".join(str(token) for token in readout.tokens)
    parts = (
        f"{tokens} at {_place(readout)}: {_score(readout)}",
        f"target {_target(readout)}, loss {readout.loss}"
        + (f" {readout.margin:g}" if readout.loss == "margin" else "")
        + f", weight {readout.weight:g}{_when(readout.first_step, config)}",
        f"advantages {_advantages(readout, config)}",
    )
    steps = (readout.first_step, readout.advantages_first_step)
    on = any(step is not None and step <= config.run.steps for step in steps)
    return f"readout {readout.name}", on, "; ".join(parts)


def _place(readout: Readout) -> str:
    if readout.position == "every":
        return f"every {readout.every} tokens"
    text = {"delimiter": readout.delimiter, "forced": readout.forced}.get(readout.position)
    return readout.position if text is None else f"{readout.position} {text!r}"


def _score(readout: Readout) -> str:
    if readout.score != "scaled_logratio":
        return readout.score
    if readout.reference == "model" or readout.ref_logprob is None:
        reference = "to the initial model"
    else:
        reference = f"to ref_logprob {readout.ref_logprob:g}"
    return f"{readout.score} {reference}, beta {readout.beta:g}"


def _target(readout: Readout) -> str:
    gamma = f" {readout.gamma:g}" if readout.target == "group_shrunk" else ""
    right, wrong = readout.targets
    scale = "" if (right, wrong) == (1.0, 0.0) else f" on [{right:g}, {wrong:g}]"
    return f"{readout.target}{gamma}{scale}"


def _advantages(readout: Readout, config: RunConfig) -> str:
    if readout.advantages == "none":
        return "none"
    settings = {
        "mix": f", tau {readout.tau:g}",
        "discrepancy": f", kappa {readout.kappa:g}",
    }.get(readout.advantages, "")
    return f"{readout.advantages}{settings}{_when(readout.advantages_first_step, config)}"


def _when(first_step: int | None, config: RunConfig) -> str:
    if first_step is None:
        return ""  # a weight or tau of 0 stands there
    if first_step > config.run.steps:
        return f", which would start at step {first_step}, but run.steps is {config.run.steps}"
    return f" from step {first_step} of {config.run.steps}"


def _scheduled(name: str, first_step: int | None, config: RunConfig, weight: str) -> Line:
    if first_step is None:
        return name, False, "laser.enabled is false" if not config.laser.enabled else weight
    if first_step > config.run.steps:
        detail = f"would start at step {first_step}, but run.steps is {config.run.steps}; {weight}"
        return name, False, detail
    return name, True, f"from step {first_step} of {config.run.steps}, {weight}"

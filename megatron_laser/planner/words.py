"""Layouts and times as one would say them."""

from __future__ import annotations

from megatron_laser.config.derived import recompute_words
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.planner.layouts import Candidate
from megatron_laser.planner.phase_times import StepTime

_WORTH_SAYING = 0.0005  # of a step


def seconds(value: float) -> str:
    """Seconds with about three digits, of toys as of models."""
    size = abs(value)
    return (
        f"{value:,.0f}"
        if size >= 1000
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.2f}"
        if size >= 0.1
        else f"{value:.4f}"
    )


def against(first: StepTime, second: StepTime) -> str:
    """Where `second` differs from `first` in seconds a step, and in which phases, the largest first."""
    mine = {phase.name: phase.seconds for phase in first.phases}
    moved = [(phase.seconds - mine.get(phase.name, 0.0), phase.name) for phase in second.phases]
    worth = _WORTH_SAYING * first.seconds
    said = [
        f"{name} {_signed(by)}" for by, name in sorted(moved, key=lambda one: -abs(one[0])) if abs(by) > worth
    ]
    total = second.seconds - first.seconds
    if abs(total) <= worth and not said:
        return "as fast"
    return f"{_signed(total)} a step" + (f" ({', '.join(said[:3])})" if said else "")


def signed(value: float) -> str:
    """Seconds with their sign."""
    return f"{'+' if value >= 0 else ''}{seconds(value)}"


def _signed(value: float) -> str:
    return f"{signed(value)} s"


def describe(candidate: Candidate) -> str:
    """A layout in one line: GPUs, cuts, what is recomputed or away."""
    split, layout, config = candidate.split, candidate.plan.layout, candidate.plan.config
    parts = [f"{split.trainer} GPUs train" if split.trainer > 1 else "1 GPU trains"]
    if split.engine == "apart":
        tensor = config.rollout.sglang.tensor
        servers = split.servers // tensor
        parts.append(
            f"{servers} servers of {tensor} generate" if servers > 1 else f"1 server of {tensor} generates"
        )
    else:
        how = {
            "colocated": "a server on the same GPU",
            "in_process": "rank 0 generates",
            "none": "nobody generates",
        }
        parts.append(how[split.engine])
    cuts = [f"tensor {layout.tensor}"]
    for name, value in (
        ("pipeline", layout.pipeline),
        ("virtual", layout.virtual_pipeline),
        ("context", layout.context),
        ("expert", layout.expert),
        ("expert tensor", layout.expert_tensor),
    ):
        if value > 1:
            cuts.append(f"{name} {value}")
    return ", ".join([*parts, " ".join([*cuts, f"data {layout.data}"]), saved(config)])


def saved(config: RunConfig) -> str:
    """What is recomputed or kept in host memory."""
    parts = [f"recompute {recompute_words(config.model)}"]
    if config.model.offload_activations:
        parts.append("activations in host memory")
    if config.optimizer.offload:
        parts.append("optimizer in host memory")
    return ", ".join(parts)

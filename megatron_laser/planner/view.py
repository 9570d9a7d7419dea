"""What `plan` prints, as lines of text: phases, memory, layouts, changes, assumptions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from megatron_laser.config.plan.lines import HOST, KEPT, PHASES, STATE, gib
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.planner.advice import Advice
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.ranking import Ranked, Ranking
from megatron_laser.planner.words import against, describe, seconds, signed

WIDTH = 118


def phase_lines(title: str, ranked: Ranked, machine: Machine) -> list[str]:
    """The phases of one layout's step and its total; `title` says what the layout is: "as configured"."""
    candidate, step = ranked.candidate, ranked.step
    total = sum(phase.seconds for phase in step.phases)
    lines = [
        *_wrapped(f"{title}: {describe(candidate)}", "  "),
        f"{'phase':<10}{'seconds':>9}{'share':>8}  bound by",
    ]
    for phase in step.phases:
        share = phase.seconds / total if total else 0.0
        lines.append(f"{phase.name:<10}{seconds(phase.seconds):>9}{share:>8.0%}  {phase.bound}".rstrip())
    idle = f"trainer idle {step.trainer_idle:.0%}" + (
        f", servers idle {step.server_idle:.0%}" if candidate.split.servers else ""
    )
    lines.append(f"{'step':<10}{seconds(step.seconds):>9}{'':>8}  {step.bottleneck}; {idle}")
    memory = ranked.plan.memory
    host = f", and {gib(memory.host)} of host memory" if memory.host else ""
    lines.append(
        f"memory: {gib(memory.total)} of {machine.memory_gib:g} GiB on the fullest GPU ({memory.peak_phase}){host}"
    )
    lines.append(f"cost: {cost(ranked, machine)}, {step.tokens / step.seconds:,.0f} tokens/s")
    return lines


def detail_lines(ranked: Ranked) -> list[str]:
    """The arithmetic of each phase in words, and the seconds of its parts."""
    lines = ["how long each phase takes, and why"]
    for phase in ranked.step.phases:
        parts = ", ".join(f"{name} {seconds(value)} s" for name, value in phase.parts.items() if value > 0)
        text = f"  {phase.name}: {phase.detail}" + (f" [{parts}]" if len(phase.parts) > 1 else "")
        lines += _wrapped(text, "    ")
    return lines


def cost(ranked: Ranked, machine: Machine) -> str:
    """GPU hours of 1,000 steps, and their price where the machine has one."""
    hours = ranked.gpu_hours
    count = ranked.candidate.gpus
    shown = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
    words = f"{count} GPU{'s' if count > 1 else ''}, {shown} GPU hours per 1,000 steps"
    if machine.price_per_gpu_hour is not None:
        words += f" ({hours * machine.price_per_gpu_hour:,.0f} at {machine.price_per_gpu_hour:g} a GPU hour)"
    return words


def memory_lines(plan: Plan) -> list[str]:
    """The memory sum of the fullest rank, line by line."""
    memory = plan.memory
    lines = ["memory of the fullest rank (the dry run's sum)"]
    for line in memory.lines:
        if line.phase != HOST and (line.bytes or line.name == KEPT):
            when = "always" if line.phase == STATE else line.phase
            lines.append(f"  {line.name:<28}{gib(line.bytes):>12}  {when}: {line.detail}")
    phases = ", ".join(
        f"{phase} {gib(memory.phase_bytes(phase))}" for phase in PHASES if memory.phase_bytes(phase)
    )
    lines.append(
        f"  {'sum':<28}{gib(memory.total):>12}  {gib(memory.phase_bytes(STATE))} always + the largest of {phases}"
    )
    return lines


def layout_lines(ranking: Ranking, most: int) -> list[str]:
    """The fastest layouts, a line each, with what each loses against the first."""
    ranked = ranking.layouts
    shown = ranked[:most]
    lines = [
        f"the fastest {len(shown)} of {len(ranked):,} cuts that fit {ranking.share:.0%} of a GPU ({ranking.tried:,} "
        f"layouts tried, {ranking.impossible:,} impossible, {ranking.too_large:,} cuts too large)",
        f"{'':>2} {'s/step':>8} {'train':>6} {'servers':>10}  {'t':>2} {'p':>2} {'v':>2} {'c':>2} {'d':>4} {'e':>3} "
        f"{'tokens':>7} {'GiB':>6}  recompute, then what it loses to the best",
    ]
    for number, one in enumerate(shown, 1):
        layout, config, split = one.plan.layout, one.plan.config, one.candidate.split
        servers = f"{split.servers // config.rollout.sglang.tensor} x {config.rollout.sglang.tensor}"
        if split.engine != "apart":
            servers = split.engine.replace("_", " ")
        recompute = config.model.recompute
        how = recompute if isinstance(recompute, str) else "+".join(recompute)
        how += ", offload" if config.optimizer.offload else ""
        lines.append(
            f"{number:>2} {seconds(one.step.seconds):>8} {split.trainer:>6} {servers:>10}  {layout.tensor:>2} "
            f"{layout.pipeline:>2} {layout.virtual_pipeline:>2} {layout.context:>2} {layout.data:>4} "
            f"{layout.expert:>3} {config.batching.tokens_per_micro_batch:>7} "
            f"{one.plan.memory.total / 2**30:>6.1f}  {how}"
            + (f"; {against(ranking.best.step, one.step)}" if one is not ranking.best else "; the best")
        )
    return lines


def advice_lines(advice: Sequence[Advice], chosen: Ranked, machine: Machine) -> list[str]:
    """What would help most, by seconds gained."""
    lines = [
        "what would help most (one thing changed, predicted again)",
        f"  {'gain':>8} {'s/step':>8} {'GPU h/1,000':>12}  change, and what it costs",
    ]
    for one in advice:
        step, words = one.ranked.step, f"{one.change.name}: {one.change.price}"
        if not one.fits:
            needed = gib(one.ranked.plan.memory.total)
            words = f"{one.change.name}: does not fit, {needed} of {machine.memory_gib:g} GiB"
        lines.append(
            f"  {signed(one.gain):>8} {seconds(step.seconds):>8} {one.ranked.gpu_hours:>12,.0f}  {words}"
        )
    lines.append(f"  {'':>8} {seconds(chosen.step.seconds):>8} {chosen.gpu_hours:>12,.0f}  as it is")
    return lines


def wrapped_list(title: str, items: Iterable[str]) -> list[str]:
    """A title and indented sentences below it."""
    lines = [title]
    for item in items:
        lines += _wrapped(f"  {item}", "    ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False) or [""]

"""All of what `plan` finds out about a run on a number of GPUs, and how it is said: lines or JSON."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from megatron_laser.config.plan.lines import PHASES
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.errors import ConfigError
from megatron_laser.planner.advice import Advice, advise
from megatron_laser.planner.assumptions import Assumptions
from megatron_laser.planner.configured import as_configured, base_plan
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.phase_times import predict_step
from megatron_laser.planner.ranking import Ranked, Ranking, rank, reasons
from megatron_laser.planner.run_file import PlannedRun, as_overrides, as_yaml, differences
from megatron_laser.planner.view import (
    advice_lines,
    detail_lines,
    layout_lines,
    memory_lines,
    phase_lines,
    wrapped_list,
)
from megatron_laser.planner.words import against, describe


@dataclass(frozen=True, slots=True)
class PlanReport:
    """configured: the run's own layout, None where it has none or cannot run (`not_configured` says why).
    ranking: None without a search. advice: changes of the layout that was chosen, of the configured one without."""

    run: PlannedRun
    base: Plan
    gpus: int
    machine: Machine
    assumptions: Assumptions
    configured: Ranked | None
    not_configured: tuple[str, ...]
    ranking: Ranking | None
    advice: tuple[Advice, ...]

    @property
    def best(self) -> Ranked | None:
        """The best layout of the search."""
        return self.ranking.best if self.ranking else None

    @property
    def chosen(self) -> Ranked | None:
        """What memory and advice are of: the best layout, without a search the configured one."""
        return self.best or self.configured

    def check(self) -> None:
        """Raises ConfigError where the one layout that was asked for cannot run or does not fit."""
        if self.ranking is not None:
            return
        if self.configured is None:
            raise ConfigError(self.not_configured)
        self.configured.plan.memory.check(self.machine.memory_gib * 2**30)


def make_report(
    run: PlannedRun,
    gpus: int,
    machine: Machine,
    assumptions: Assumptions,
    *,
    server_gpus: int | None = None,
    search: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> PlanReport:
    """Predict the configured layout and, with `search`, rank all others.

    Raises:
        ConfigError: the run cannot be planned.
        NothingFits: no layout of the search fits.
    """
    if run.config.run.mode == "rollout_only":
        raise ConfigError(
            [
                "run.mode: rollout_only has no trainer, and a plan is of a trainer beside its servers: plan it with "
                "run.mode=train, whose phase generate is what it would take"
            ]
        )
    base = base_plan(run.config, machine)
    configured: Ranked | None = None
    why: tuple[str, ...] = ()
    if not run.is_default:
        try:
            candidate = as_configured(base, gpus, machine, server_gpus)
            step = predict_step(candidate.plan, machine, assumptions, candidate.split.servers)
            configured = Ranked(candidate, step)
        except ConfigError as error:
            why = error.problems
    ranking = rank(base, gpus, machine, assumptions, say) if search else None
    chosen = ranking.best if ranking else configured
    advice = tuple(advise(chosen, machine, assumptions)) if chosen is not None else ()
    return PlanReport(run, base, gpus, machine, assumptions, configured, why, ranking, advice)


def report_lines(report: PlanReport, most: int) -> list[str]:
    """Everything, as text; `most`: layouts that are listed."""
    machine, chosen = report.machine, report.chosen
    rollout = report.run.config.rollout
    lines = [
        f"{report.run.config.run.name} on {report.gpus} x {machine.name}, {rollout.prompts_per_step:,} prompts x "
        f"{rollout.samples_per_prompt} samples a step: predicted, not measured"
    ]
    if report.run.default_of:
        lines += wrapped_list("", [report.run.default_of])[1:]
    lines.append("")
    lines += configured_lines(report)
    if report.ranking is not None:
        best = report.ranking.best
        lines += phase_lines("best", best, machine)
        if report.configured is not None:
            lines.append(f"against as configured: {against(report.configured.step, best.step)}")
        lines += ["", *wrapped_list("why this one", reasons(report.ranking)), ""]
    if chosen is not None:
        lines += [*detail_lines(chosen), "", *memory_lines(chosen.plan), ""]
    if report.ranking is not None:
        lines += [*layout_lines(report.ranking, most), ""]
        settings = differences(report.run.config, report.ranking.best.plan.config)
        lines += setting_lines(settings)
    if chosen is not None:
        lines += [*advice_lines(report.advice, chosen, machine), ""]
    return lines + assumption_lines(report.assumptions, machine)


def configured_lines(report: PlanReport) -> list[str]:
    """The configuration's own layout; what a recipe's README quotes."""
    if report.run.is_default:
        return []
    if report.configured is None:
        return [*wrapped_list("as configured: cannot run", report.not_configured), ""]
    lines = phase_lines("as configured", report.configured, report.machine)
    if report.configured.plan.memory.total > report.machine.memory_gib * 2**30:
        lines.append("it does not fit")
    return [*lines, ""]


def setting_lines(settings: dict[str, Any]) -> list[str]:
    """The fastest layout to paste: as YAML, and as arguments."""
    if not settings:
        return ["the configuration has the best layout already", ""]
    return [
        "the best layout, to paste into the YAML",
        *(f"  {line}" for line in as_yaml(settings).splitlines()),
        "or behind the command",
        *(f"  {shlex.quote(item)}" for item in as_overrides(settings)),
        "",
    ]


def assumption_lines(assumptions: Assumptions, machine: Machine) -> list[str]:
    """What was assumed, with its source."""
    return [
        *wrapped_list("assumptions", assumptions.lines()),
        *wrapped_list(f"machine {machine.name}", machine.lines()),
    ]


def report_json(report: PlanReport) -> dict[str, Any]:
    """The same for programs; times in seconds, memory in bytes."""
    best = report.best
    return {
        "run": report.run.config.run.name,
        "default_of": report.run.default_of or None,
        "gpus": report.gpus,
        "machine": _plain(report.machine),
        "assumptions": _plain(report.assumptions),
        "as_configured": _layout(report.configured) if report.configured else None,
        "not_configured": list(report.not_configured),
        "best": _layout(best) if best else None,
        "overrides": as_overrides(differences(report.run.config, best.plan.config)) if best else [],
        "layouts": [_layout(one) for one in report.ranking.layouts] if report.ranking else [],
        "advice": [
            {"change": one.change.name, "price": one.change.price, "gain": one.gain, "fits": one.fits}
            | _layout(one.ranked)
            for one in report.advice
        ],
    }


def _layout(ranked: Ranked) -> dict[str, Any]:
    layout, memory, step = ranked.plan.layout, ranked.plan.memory, ranked.step
    config, split = ranked.plan.config, ranked.candidate.split
    return {
        "layout": describe(ranked.candidate),
        "trainer_gpus": split.trainer,
        "server_gpus": split.servers,
        "server_tensor": config.rollout.sglang.tensor,
        "engine": split.engine,
        "parallel": {
            name: getattr(layout, name)
            for name in (
                "tensor",
                "pipeline",
                "virtual_pipeline",
                "context",
                "data",
                "expert",
                "expert_tensor",
            )
        },
        "seconds": step.seconds,
        "bottleneck": step.bottleneck,
        "tokens": step.tokens,
        "gpu_hours_per_1000_steps": ranked.gpu_hours,
        "phases": [
            {"name": phase.name, "seconds": phase.seconds, "bound": phase.bound, "parts": dict(phase.parts)}
            for phase in step.phases
        ],
        "memory": {
            "total": memory.total,
            "peak": memory.peak_phase,
            "host": memory.host,
            "phases": {phase: memory.phase_bytes(phase) for phase in PHASES},
        },
    }


def _plain(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}

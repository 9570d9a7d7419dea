"""The search: layouts that fit, by predicted seconds of a step, and in words why the first is before the second."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES
from megatron_laser.config.plan.lines import STATE, gib
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.errors import ConfigError, UserError
from megatron_laser.planner.assumptions import Assumptions
from megatron_laser.planner.layouts import (
    Candidate,
    Proposer,
    Shape,
    Split,
    between,
    budgets,
    server_tensors,
    shapes,
    splits,
)
from megatron_laser.planner.machine import Machine
from megatron_laser.planner.phase_times import StepTime, predict_step
from megatron_laser.planner.words import against, describe

ROOM = 0.9
"""Of a GPU's memory a layout may take so much: nothing of the sum has been measured on one yet."""
TIE = 0.005
_SHAPES = 8  # of one split that go on to the others
_SPLITS = 3  # that are looked at closely
_WIDEST = 1024  # GPUs at which a refused model is asked for its fewest

Say = Callable[[str], None]


class NothingFits(UserError, ValueError):
    """No layout can run on these GPUs; the arithmetic, a line each."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A layout with its predicted step."""

    candidate: Candidate
    step: StepTime

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return self.candidate.plan

    @property
    def gpu_hours(self) -> float:
        """GPU hours of 1,000 steps."""
        return self.step.seconds * self.candidate.gpus / 3.6


def predicted(candidate: Candidate, machine: Machine, assumptions: Assumptions) -> Ranked | None:
    """A layout with its step; None where its servers have no room for one response."""
    try:
        return Ranked(candidate, predict_step(candidate.plan, machine, assumptions, candidate.split.servers))
    except ConfigError:
        return None


@dataclass(frozen=True, slots=True)
class Ranking:
    """layouts: the fastest first, at most one for each split and shape. share: of the GPU's memory they may take.

    best: the simplest of those that are within `TIE` of the fastest, which the arithmetic cannot tell apart.
    """

    layouts: tuple[Ranked, ...]
    tried: int
    impossible: int
    too_large: int
    share: float

    @property
    def best(self) -> Ranked:
        """The one to take."""
        limit = self.layouts[0].step.seconds * (1 + TIE)
        return min((one for one in self.layouts if one.step.seconds <= limit), key=_simplicity)


def rank(
    base: Plan, gpus: int, machine: Machine, assumptions: Assumptions, say: Say = lambda text: None
) -> Ranking:
    """Search the layouts of `base`'s run on `gpus` GPUs.

    Args:
        base: the run as it was resolved for any number of ranks, of `machine`'s memory.
        say: told now and then what is being looked at.

    Raises:
        NothingFits: says the smallest need that was found, its largest lines, and what would change it.
        ConfigError: no whole number of nodes.
    """
    proposer = None
    for share, wide in ((ROOM, False), (1.0, True)):
        proposer = Proposer(base, machine, share)
        found = _Search(proposer, gpus, assumptions, wide, say).run()
        if found:
            return Ranking(tuple(found), proposer.tried, proposer.impossible, proposer.too_large, share)
    assert proposer is not None
    raise NothingFits("\n".join(_refusal(base, gpus, machine, proposer)))


class _Search:
    """One search; `wide`: everything that may fit, where the usual does not."""

    def __init__(self, proposer: Proposer, gpus: int, assumptions: Assumptions, wide: bool, say: Say) -> None:
        self._proposer, self._gpus, self._assumptions, self._wide, self._say = (
            proposer,
            gpus,
            assumptions,
            wide,
            say,
        )
        self._config, self._architecture = proposer.base.config, proposer.base.architecture
        self._machine = proposer.machine
        self._seen: dict[tuple[Split, Shape, int, int], list[Ranked]] = {}
        self._servers: dict[Split, int] = {}  # GPUs of a server that generates fastest

    def run(self) -> list[Ranked]:
        """The fastest first."""
        todo = splits(self._config, self._architecture, self._gpus, self._machine)
        usable = [split for split in todo if self._tensors(split)]
        first = usable if len(usable) <= 7 else [usable[round(i * (len(usable) - 1) / 4)] for i in range(5)]
        good: dict[Shape, float] = {}
        for number, split in enumerate(first):
            self._say(
                f"split {number + 1} of {len(first)}: {split.trainer} GPUs train, {split.servers} generate; "
                f"{self._proposer.tried:,} layouts so far"
            )
            everything = list(
                shapes(self._config, self._architecture, split.trainer, self._machine, self._wide)
            )
            self._try(split, everything, None)
            here = self._ranked(one for key, found in self._seen.items() if key[0] == split for one in found)
            for ranked in here[:_SHAPES]:
                good.setdefault(ranked.candidate.shape, ranked.step.seconds)
        for split in usable:
            if split not in first:
                self._try(split, good, None)
        self._refine(usable)
        return self._ranked(one for found in self._seen.values() for one in found)

    def _refine(self, usable: Sequence[Split]) -> None:
        """Other server sizes, budgets, chunks of layers, and splits in between, around the best."""
        best = self._ranked(one for found in self._seen.values() for one in found)
        near: list[Split] = []
        for ranked in best:
            if ranked.candidate.split not in near:
                near.append(ranked.candidate.split)
        self._say(
            f"around the best {min(len(near), _SPLITS)} splits; {self._proposer.tried:,} layouts so far"
        )
        for split in near[:_SPLITS]:
            keep = [one.candidate.shape for one in best if one.candidate.split == split][:4]
            self._try(split, keep, self._tensors(split))
            self._try(split, [replace(shape, virtual=2) for shape in keep if shape.pipeline > 1], None)
            for shape in keep:
                for budget in budgets(self._config, shape.context):
                    self._try(split, [shape], None, budget)
        best = self._ranked(one for found in self._seen.values() for one in found)
        for one in best[:3]:  # what is good at one split, at its neighbours
            tokens = one.plan.config.batching.tokens_per_micro_batch
            for split in near[: 2 * _SPLITS]:
                self._try(split, [one.candidate.shape], None, tokens)
        best = self._ranked(one for found in self._seen.values() for one in found)
        apart = [split for split in usable if split.engine == "apart"]
        for _ in range(4 if best and len(apart) > 2 else 0):
            top = best[0]
            tensor = top.plan.config.rollout.sglang.tensor
            budget = top.plan.config.batching.tokens_per_micro_batch
            tried = sorted(
                {key[0] for key in self._seen if key[0].engine == "apart"}, key=lambda split: split.trainer
            )
            if top.candidate.split not in tried:
                return
            place = tried.index(top.candidate.split)
            for other in tried[max(0, place - 1) : place] + tried[place + 1 : place + 2]:
                if middle := between(top.candidate.split, other, self._machine, self._gpus):
                    self._try(middle, [one.candidate.shape for one in best[:3]], [tensor], budget)
            best = self._ranked(one for found in self._seen.values() for one in found)

    def _tensors(self, split: Split) -> list[int]:
        if split.engine in ("in_process", "none"):
            return [1]
        gpus = split.trainer if split.engine == "colocated" else split.servers
        return server_tensors(self._config, self._architecture, gpus, self._machine)

    def _try(
        self, split: Split, every: Iterable[Shape], tensors: Sequence[int] | None, budget: int | None = None
    ) -> None:
        """tensors: of servers; None: the one that generates fastest, with the first shape that fits."""
        given = self._config.batching.tokens_per_micro_batch
        for shape in every:
            if split.trainer % shape.ranks:
                continue
            least = -(-longest_sequence(self._config) // (1024 * shape.context)) * 1024
            tokens = budget or max(given, least)
            if tensors is None and split in self._servers:
                tensors = [self._servers[split]]
            for tensor in self._tensors(split) if tensors is None else tensors:
                key = (split, shape, tokens, tensor)
                if key in self._seen:
                    continue
                found = self._proposer.fitting(split, shape, tokens, tensor)
                if self._wide and not found and tokens != least:
                    found = self._proposer.fitting(split, shape, least, tensor)
                self._seen[key] = [
                    ranked for one in found if (ranked := predicted(one, self._machine, self._assumptions))
                ]
                if not found:
                    break  # it is the trainer's memory, whatever the servers are
            here = [one for key, found in self._seen.items() if key[:2] == (split, shape) for one in found]
            if split not in self._servers and here:
                best = min(here, key=lambda one: one.step.phase("generate").seconds)
                self._servers[split] = best.plan.config.rollout.sglang.tensor

    @staticmethod
    def _ranked(every: Iterable[Ranked]) -> list[Ranked]:
        """The fastest first, one for each split, shape and kind of server."""
        best: dict[tuple[Split, Shape], Ranked] = {}
        for one in every:
            key = (one.candidate.split, one.candidate.shape)
            if key not in best or _order(one) < _order(best[key]):
                best[key] = one
        return sorted(best.values(), key=_order)


def _order(one: Ranked) -> tuple[float, ...]:
    """By time; of equals the simpler one."""
    return (round(one.step.seconds, 6), *_simplicity(one))


def _simplicity(one: Ranked) -> tuple[float, ...]:
    """Less of what has to go right is less: kinds of parallelism, then host memory, ranks of a model, device memory."""
    shape, config = one.candidate.shape, one.plan.config
    kinds = [
        shape.pipeline > 1,
        shape.virtual > 1,
        shape.context > 1,
        shape.expert_tensor > 1,
        shape.tensor > 1,
    ]
    away = config.optimizer.offload + config.model.offload_activations
    return (sum(kinds) + away, shape.ranks, one.step.seconds, one.plan.memory.total)


def reasons(ranking: Ranking) -> list[str]:
    """Sentences: what bounds the best layout, and what the others lose against it."""
    best, fastest = ranking.best, ranking.layouts[0]
    slowest = max(best.step.phases, key=lambda phase: phase.seconds)
    share = slowest.seconds / sum(phase.seconds for phase in best.step.phases)
    lines = [f"{slowest.name} takes {share:.0%} of the phases' time and is bound by {slowest.bound}"]
    if best is not fastest:
        lines.append(
            f"{describe(fastest.candidate)} would be faster by {best.step.seconds - fastest.step.seconds:.2g} s, less "
            f"than {TIE:.1%}, which this arithmetic cannot tell: of equals the simpler one"
        )
    others = [
        one for one in ranking.layouts if one.candidate.split == best.candidate.split and one is not best
    ]
    elsewhere = [one for one in ranking.layouts if one.candidate.split != best.candidate.split]
    for what, ones in (
        ("the next cut of as many trainers", others),
        ("the next split of the GPUs", elsewhere),
    ):
        worse = [one for one in ones if one.step.seconds >= best.step.seconds]
        if worse:
            lines.append(f"{what}, {describe(worse[0].candidate)}: {against(best.step, worse[0].step)}")
    return lines


def _refusal(base: Plan, gpus: int, machine: Machine, proposer: Proposer) -> list[str]:
    architecture, config = base.architecture, base.config
    size = f"{gpus} GPUs of {machine.memory_gib:g} GiB ({machine.name})"
    if proposer.smallest is None:
        if not any(
            server_tensors(config, architecture, split.servers or split.trainer, machine)
            for split in splits(config, architecture, gpus, machine)
        ):
            weights = base.parameters * DTYPE_BYTES[config.model.dtype]
            return [
                f"no layout on {size}: a server must hold the weights, {gib(weights)} in {config.model.dtype}, and "
                "one longest sequence on a share of its GPUs; " + _cures(base, gpus, machine)
            ]
        return [
            f"no layout on {size} is possible: all {proposer.impossible:,} were refused by the checks, the first for",
            *(f"  - {problem}" for problem in proposer.problems),
        ]
    plan = proposer.smallest.plan
    memory, layout = plan.memory, plan.layout
    there = [line for line in memory.lines if line.phase in (STATE, memory.peak_phase)]
    largest = sorted(there, key=lambda line: -line.bytes)[:4]
    words = describe(proposer.smallest)
    return [
        f"no layout fits {size}: {proposer.tried:,} were tried, and the smallest needs {gib(memory.total)} a GPU "
        f"({memory.peak_phase}), {gib(memory.total - machine.memory_gib * 2**30)} more than there is: {words}",
        "  - its largest lines: "
        + "; ".join(f"{line.name} {gib(line.bytes)} ({line.detail or line.phase})" for line in largest),
        f"  - weights, gradients and optimizer alone are {gib(plan.bytes_per_rank.total)} a rank of "
        f"{layout.world_size}, at {plan.parameters:,} parameters",
        "  - what would change it: " + _cures(base, gpus, machine),
    ]


def _cures(base: Plan, gpus: int, machine: Machine) -> str:
    """The fewest GPUs that fit, by doubling, and settings that change what is computed."""
    node = machine.gpus_per_node
    more = gpus
    while more <= _WIDEST:
        more *= 2
        if more > node:  # several nodes are whole ones
            more = -(-more // node) * node
        if more > _WIDEST:
            break
        proposer = Proposer(base, machine, 1.0)
        if any(_any_fits(proposer, split) for split in splits(base.config, base.architecture, more, machine)):
            break
    fewest = (
        f"{more} GPUs, which fit" if more <= _WIDEST else f"a smaller model (even {_WIDEST} GPUs do not fit)"
    )
    settings = []
    if base.config.optimizer.moments_dtype == "float32":
        settings.append("optimizer.moments_dtype: bfloat16 (2/3 of the optimizer's state)")
    if base.config.optimizer.gradient_dtype == "float32":
        settings.append("optimizer.gradient_dtype: bfloat16")
    if base.config.rollout.max_new_tokens > 2048:
        settings.append("a smaller rollout.max_new_tokens")
    words = f"{fewest}; GPUs with more memory"
    return f"{words}; or settings that change what is computed: {', '.join(settings)}" if settings else words


def _any_fits(proposer: Proposer, split: Split) -> bool:
    config, architecture, machine = proposer.base.config, proposer.base.architecture, proposer.machine
    gpus = split.servers or split.trainer
    alone = split.engine in ("in_process", "none")
    tensors = [1] if alone else server_tensors(config, architecture, gpus, machine)
    if not tensors:
        return False
    return any(
        proposer.fitting(split, shape, budgets(config, shape.context)[0], tensors[0])
        for shape in shapes(config, architecture, split.trainer, machine, wide=False)
    )

"""What a training step really allocates on a CPU beside what the dry run says: phase by phase, and line by line.

A trainer is built from the run's configuration and takes two steps on random rollouts, of which the second is measured:
Adam's moments are there then. Rollouts are as the dry run assumes them, all prompts and responses of the greatest
length, so that its bound is above what is there only where whole sequences do not fill
`batching.tokens_per_micro_batch`.

What is compared is the memory of tensors. The rest of a process (Python, libraries) is in neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_laser.benchmarks.memory_tracker import Interval, MemoryTracker, without
from megatron_laser.benchmarks.random_rollouts import random_rollouts
from megatron_laser.benchmarks.result import Result, aligned, provenance
from megatron_laser.config import ConfigError
from megatron_laser.config.model_folder.architecture import read_architecture
from megatron_laser.config.plan.lines import STATE, STEP, UPDATE, MemoryLine, gib
from megatron_laser.config.plan.resolve import resolve_rank_memory
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model import platform
from megatron_laser.observability.timers import Timers
from megatron_laser.trainer.offload import Part
from megatron_laser.trainer.trainer import Trainer

# A step that is repeated may end so much away from where it began: figures that are reported, caches of shapes.
_DRIFT = 0.01
TOTALS = {STATE: "between steps", UPDATE: "at the update's peak", STEP: "at the optimizer step's peak"}


@dataclass(frozen=True)
class Line:
    """Bytes of a phase, or of one line of it, on one rank: as planned, and as measured (None: not told apart)."""

    phase: str
    name: str
    planned: int
    measured: int | None


@dataclass(frozen=True)
class MemoryResult(Result):
    """One list of lines a rank; a phase's total is its line of the name in `TOTALS`.

    tokens: of the fullest micro-batch on each rank. drift: bytes by which a repeated step ended above its beginning.
    """

    lines: list[list[Line]]
    tokens: list[int]
    drift: list[int]

    def total(self, rank: int, phase: str) -> Line:
        """All that is there at one phase's fullest moment, the state included."""
        return next(
            line for line in self.lines[rank] if line.phase == phase and line.name == TOTALS.get(phase)
        )

    def table(self) -> str:
        """A table for people."""
        parts = [str(self.provenance)]
        for rank, lines in enumerate(self.lines):
            rows = [["", "planned", "measured", "planned / measured"]]
            for line in lines:
                of = "" if line.name == TOTALS.get(line.phase) else "  "
                rows.append([of + f"{line.phase}: {line.name}", gib(line.planned), *_measured(line)])
            parts += [
                f"rank {rank}, micro-batches of up to {self.tokens[rank]:,} tokens, "
                f"{gib(abs(self.drift[rank]))} {'more' if self.drift[rank] >= 0 else 'less'} after the measured step",
                *aligned(rows),
            ]
        return "\n".join(parts)


def _measured(line: Line) -> tuple[str, str]:
    if line.measured is None:
        return "", ""
    return gib(line.measured), f"{line.planned / line.measured:.3f}" if line.measured else ""


class _SpanTimers(Timers):
    """The trainer's phases as spans of a tracker."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self._tracker = tracker

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """As the class that it stands for."""
        with self._tracker.span(phase), super().__call__(phase):
            yield


def bench_memory(config: RunConfig) -> MemoryResult | None:
    """Measure on all ranks of this job; the result is rank 0's, None on others. Ends the job's process groups.

    Raises:
        ConfigError: there is a GPU, whose memory torch.cuda tells; or the configuration does not fit the ranks.
    """
    if platform.has_cuda():
        raise ConfigError(
            [
                "bench memory follows torch's CPU allocator, and this machine has a GPU; hide it: "
                "CUDA_VISIBLE_DEVICES= megatron-laser bench memory ..."
            ]
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    # Before anything is built; also says what is wrong with the configuration.
    sums = resolve_rank_memory(config, world_size, device="cpu")
    runtime = runtimes.start(config)
    try:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        # There is no engine here.
        planned = tuple(line for line in sums[stage].lines if not line.name.startswith("in-process engine"))
        lines, tokens, drift = _measure(config, runtime, planned)
        mine = (lines, tokens, drift)
        found: list[Any] = [None] * world_size
        if world_size > 1:
            dist.all_gather_object(found, mine, group=runtime.cpu_group)
        else:
            found = [mine]
        if runtime.rank:
            return None
        ranks = [list(part) for part in zip(*found, strict=True)]
        return MemoryResult(provenance(), *ranks)
    finally:
        runtimes.stop()


def _measure(
    config: RunConfig, runtime: runtimes.Runtime, planned: tuple[MemoryLine, ...]
) -> tuple[list[Line], int, int]:
    with MemoryTracker() as tracker:
        trainer = Trainer(config, runtime, score_token_id=_score_token(config), timers=_SpanTimers(tracker))
        flat = _rollouts(config)
        tokens = max(batch.tokens.shape[1] for batch in trainer.prepare(flat).micro_batches)
        trainer.train_step(flat, 1)
        policy = trainer.policy
        policy.optimizer.step = _spanned(tracker, "optimizer", policy.optimizer.step)  # type: ignore[method-assign]
        for model in policy.chunks.models:
            model._log_probs = _spanned(tracker, "head", model._log_probs)  # type: ignore[method-assign,assignment]
        with tracker.span("step"):
            trainer.train_step(flat, 2)
        state = _state_bytes(trainer)
    ((begin, end),) = tracker.spans("step")
    updates = [span for span in tracker.spans("train") if span[0] >= begin]
    steps = tracker.spans("optimizer")
    update = without(updates, steps)
    before = tracker.live(begin)
    lines = _lines(planned, STATE, before, state)
    lines += _lines(planned, UPDATE, tracker.peak(update), _update_bytes(tracker, update))
    lines += _lines(planned, STEP, tracker.peak(steps), {})
    drift = tracker.live(end) - before
    if abs(drift) > _DRIFT * before:
        raise RuntimeError(
            f"rank {runtime.rank}: a repeated step left {gib(abs(drift))} of {gib(before)} more or less than it "
            "found: ends of some blocks were not seen, and the figures are wrong; measure again"
        )
    return lines, tokens, drift


def _lines(planned: tuple[MemoryLine, ...], phase: str, total: int, measured: dict[str, int]) -> list[Line]:
    """A phase's total, and its lines below it."""
    own = [line for line in planned if line.phase == phase]
    there = sum(line.bytes for line in planned if line.phase in (STATE, phase))
    return [
        Line(phase, TOTALS[phase], there, total),
        *(Line(phase, line.name, line.bytes, measured.get(line.name)) for line in own),
    ]


def _state_bytes(trainer: Trainer) -> dict[str, int]:
    """Of each line of the state, by the storages themselves."""
    names = {
        Part.PARAMETERS: "weights",
        Part.GRADIENTS: "gradients",
        Part.OPTIMIZER: "optimizer",
        Part.REFERENCE: "reference model",
    }
    memory = trainer.policy.memory
    return {name: sum(storage.nbytes() for storage in memory._storages(part)) for part, name in names.items()}


def _update_bytes(tracker: MemoryTracker, update: list[Interval]) -> dict[str, int]:
    """What the layers have kept when the head begins, above the update's beginning: of one micro-batch in flight."""
    inside = [
        start for start, _ in tracker.spans("head") if any(first <= start <= last for first, last in update)
    ]
    if not inside:
        return {}
    return {"activations": max(tracker.live(start) for start in inside) - tracker.live(update[0][0])}


def _spanned(tracker: MemoryTracker, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def spanned(*args: Any, **kwargs: Any) -> Any:
        with tracker.span(name):
            return call(*args, **kwargs)

    return spanned


def _score_token(config: RunConfig) -> int | None:
    """Any: what the token means does not change a step's memory."""
    return 2 if config.laser.enabled else None


def _rollouts(config: RunConfig) -> Any:
    rollout, vocabulary = config.rollout, read_architecture(config.model.path).vocab_size
    return random_rollouts(
        prompts=rollout.prompts_per_step,
        samples=rollout.samples_per_prompt,
        prompt=config.data.max_prompt_tokens,
        response=rollout.max_new_tokens,
        ids=(min(3, vocabulary - 1), vocabulary),
        eos=1,
    )

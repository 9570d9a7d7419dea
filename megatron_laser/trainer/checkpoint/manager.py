"""When and how a run saves and resumes; all ranks call every method together."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_laser.config.schema.root import RunConfig
from megatron_laser.distributed.broadcast import broadcast_arrays
from megatron_laser.distributed.runtime import Runtime, gloo_group
from megatron_laser.model import platform
from megatron_laser.observability import events
from megatron_laser.observability.quantities import format_size
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint import sharded_state, torch_dist
from megatron_laser.trainer.checkpoint.best import BEST, STATE, Best, read_best, settle_best
from megatron_laser.trainer.checkpoint.collective_errors import gathered_errors, on_every_rank, reason
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.identity import differences, model_identity
from megatron_laser.trainer.checkpoint.passed_over import passed_over
from megatron_laser.trainer.policy import Policy

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves `policy` with the run's state, and brings both back.

    loaded: the folder that `resume` loaded. passed_over: what it found besides and did not use, and why, in words; on
    rank 0.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, policy: Policy) -> None:
        self._settings = config.checkpoint
        self._last_step = config.run.steps
        self._updates = Updates(config)
        self._root = folders.checkpoint_root(config)
        self._output_dir = Path(config.run.output_dir)
        self._resumed_step = 0
        self._runtime = runtime
        self._policy = policy
        chunks = policy.chunks
        self._identity = model_identity(chunks.hf, chunks.geometry, chunks.config.params_dtype)
        # A group of its own: files take longer than anything that run.deadline is for, and the writing thread's
        # collectives must not mix with the main thread's.
        self._group = gloo_group(None, config.checkpoint.deadline)
        self._writer: _Writer | None = None
        self._trouble = ""
        self.loaded: Path | None = None
        self.passed_over: list[str] = []
        self.on_published: Callable[[int], object] = lambda step: None
        """Called on rank 0 with the step of each checkpoint that is on the disk; perhaps in another thread."""

    @property
    def trouble(self) -> str:
        """Why the newest save that was waited for failed; "" when it succeeded. The same on every rank."""
        return self._trouble

    def due(self, step: int, *, ends: bool = False) -> bool:
        """Whether the run saves after `step`; `ends`: it is the last one, whatever `run.steps` says."""
        every = self._settings.every
        last = ends or step == self._last_step
        return every > 0 and step > self._resumed_step and (step % every == 0 or last)

    def save(self, step: int, run_state: dict[str, Any] | None) -> None:
        """Save after `step`; `run_state` (rank 0's cursor and the like) is stored beside the weights.

        A failure (memory, disk full, read-only folder) is logged, and the last published checkpoint stays as it is;
        `wait` tells of it. With `checkpoint.asynchronous` the files are written while training goes on.
        """
        self.wait()
        started = time.monotonic()
        asynchronous = self._settings.asynchronous
        try:
            entries = sharded_state.build_state(self._policy, copy=asynchronous, group=self._group)
        except CheckpointError as error:  # the same on every rank
            self._failed(f"copying the state to host memory: {error}")
            return
        state = {
            "step": step,
            "optimizer_step": optimizer_state.get_step(self._policy.optimizer),
            "scheduler": self._policy.scheduler.state_dict(),
            "updates": self._updates.state(),
            "model": self._identity,
            "world_size": self._runtime.world_size,
            "run": run_state,
        }
        random_states = _random_states()
        self._writer = _Writer(lambda: self._write(step, entries, state, random_states, started))
        if asynchronous:
            if self._runtime.is_main:
                events.say("checkpoint", f"saving to {self._root} in the background", step)
            self._writer.start()
        else:
            self._writer.run()
            self.wait()

    def wait(self) -> bool:
        """Wait for a save that is under way; whether the newest one succeeded on every rank."""
        if self._writer is not None:
            error = self._writer.finish()
            self._writer = None
            self._failed("; ".join(gathered_errors(error, self._group)))
        return not self._trouble

    def _failed(self, trouble: str) -> None:
        """Keep and log `trouble`; "" is success."""
        if "iostream error" in trouble:  # all that torch's writer says of a full disk
            trouble += f" ({_room(self._root)})"
        self._trouble = trouble
        if trouble and self._runtime.is_main:
            logger.error("the checkpoint was not saved, the last published one stays valid: %s", trouble)

    def resume(self) -> dict[str, Any] | None:
        """Load the newest published checkpoint; its state, on every rank, or None when there is none.

        Raises:
            CheckpointError: it belongs to another model, lies beyond `run.steps`, is damaged or too new; the same
                on every rank, whichever found it.
        """
        path = self._newest()
        if path is None:
            return None
        state: dict[str, Any] = on_every_rank(lambda: self._checked_state(path), self._group)
        on_every_rank(lambda: self._load(path, state), self._group)
        self.loaded = path
        self._resumed_step = state["step"]
        if self._runtime.is_main:
            self._settle_best(state)
        return state

    def _checked_state(self, path: Path) -> dict[str, Any]:
        state = folders.read_state(path)
        if state["model"] != self._identity:
            raise CheckpointError(
                f"checkpoint {path} is of another model: {differences(state['model'], self._identity)}; "
                "choose another run.output_dir or the model it was trained from"
            )
        if state["step"] > self._last_step:
            raise CheckpointError(
                f"checkpoint {path} is of step {state['step']}, beyond run.steps {self._last_step}; raise "
                "run.steps, or choose another run.output_dir"
            )
        if self._settings.verify:
            folders.verify(path, part=self._runtime.rank, parts=self._runtime.world_size)
        return state

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        try:
            sharded_state.load_state(self._policy, path, state["optimizer_step"])
            # The rates come from today's configuration: run.steps, which schedules end at, may have been raised.
            self._updates.load(state)
            self._policy.scheduler.lr_decay_steps += self._updates.earlier
            self._policy.scheduler.step(increment=state["scheduler"]["num_steps"])
            if state["world_size"] == self._runtime.world_size:
                file = path / _random_file(self._runtime.rank)
                _set_random_states(torch.load(file, weights_only=False))
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be loaded: {reason(error)}"
                + ("" if self._settings.verify else "; checkpoint.verify=true names a damaged file")
            ) from error

    def _newest(self) -> Path | None:
        """Rank 0's choice: file systems of different nodes may disagree for a moment."""
        step = -1
        if self._runtime.is_main:
            found = folders.published(self._root)
            self.passed_over = passed_over(self._root, found[-1][0] if found else -1)
            folders.remove_partials(self._root)
            step = found[-1][0] if found else -1
        step = int(broadcast_arrays({"step": np.array(step)}, self._runtime)["step"])
        return None if step < 0 else folders.partial_folder(self._root, step).with_suffix("")

    def _write(
        self,
        step: int,
        entries: dict[str, Any],
        state: dict[str, Any],
        random_states: dict[str, Any],
        started: float,
    ) -> None:
        partial = folders.partial_folder(self._root, step)
        try:
            self._write_files(partial, entries, state, random_states, started)
        except Exception:
            if self._runtime.is_main:  # on a full disk its bytes are what the next save needs
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_files(
        self,
        partial: Path,
        entries: dict[str, Any],
        state: dict[str, Any],
        random_states: dict[str, Any],
        started: float,
    ) -> None:
        rank = self._runtime.rank

        def create() -> None:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        on_every_rank(create, self._group)
        torch_dist.write_sharded(entries, partial, self._group)
        files: list[Any] = [None] * self._runtime.world_size

        def own_files() -> dict[str, list[Any]]:
            torch.save(random_states, partial / _random_file(rank))
            folders.sync_files([partial / _random_file(rank)])
            return folders.digests(partial, torch_dist.rank_prefix(rank)) | folders.digests(
                partial, _random_file(rank)
            )

        dist.all_gather_object(files, on_every_rank(own_files, self._group), group=self._group)

        def publish() -> None:
            if rank != 0:
                return
            listed = {name: digest for part in files for name, digest in part.items()}
            folders.sync_files(partial / name for name in torch_dist.SHARED_FILES)
            for name in torch_dist.SHARED_FILES:
                listed |= folders.digests(partial, name)
            target = folders.publish(partial, state, listed)
            size = format_size(sum(size for size, _ in listed.values()))
            seconds = time.monotonic() - started
            events.say("checkpoint", f"saved {target}: {size} in {seconds:.1f} s", int(state["step"]))
            self.on_published(int(state["step"]))
            self._retain(self._settle_best(state))

        on_every_rank(publish, self._group)

    def _settle_best(self, state: dict[str, Any]) -> set[int]:
        """Have best.json say which is the best; its step, which retention leaves alone."""
        try:
            best = settle_best(self._output_dir, self._root, state["run"], int(state["step"]))
            return set() if best is None else {best}
        except OSError as error:  # the new checkpoint is published all the same
            logger.warning("%s cannot be written: %s", self._output_dir / BEST, error)
            kept = Best.of((state["run"] or {}).get(STATE)), read_best(self._output_dir)
            return {best.step for best in kept if best is not None}

    def _retain(self, pinned: set[int]) -> None:
        try:
            settings = self._settings
            gone = folders.retain(
                self._root, keep_last=settings.keep_last, keep_every=settings.keep_every, pinned=pinned
            )
            if gone:
                events.note("checkpoint", f"deleted {', '.join(path.name for path in gone)}")
        except OSError as error:  # the new checkpoint is published all the same
            logger.warning("old checkpoints in %s could not be deleted: %s", self._root, error)


class Updates:
    """Optimizer steps of a training step, which `policy.minibatches` and `policy.epochs` may change during a run.

    earlier: by how many the steps so far had more (or fewer) than they would have today: schedules, which end at the
    run's last optimizer step, end so many later.
    """

    def __init__(self, config: RunConfig) -> None:
        self._each = config.policy.minibatches * config.policy.epochs
        self.earlier = 0

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"each": self._each, "earlier": self.earlier}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint's state says; one of an earlier version says nothing."""
        there = state.get("updates") or {"each": self._each, "earlier": 0}
        self.earlier = int(there["earlier"]) + int(state["step"]) * (int(there["each"]) - self._each)


class _Writer:
    """One save, in this thread or in another; keeps its error for `finish`."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._device = platform.device()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run_in_thread, name="checkpoint-writer")
        self._thread.start()

    def _run_in_thread(self) -> None:
        # Else torch's file writer would make a context, half a GiB, on GPU 0 for every rank of the node.
        platform.use_device(self._device)
        self.run()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = CheckpointError(reason(error))  # without its frames, which hold the state, too
        self._work = None  # the state leaves host memory now, not at the next save

    def finish(self) -> Exception | None:
        if self._thread is not None:
            self._thread.join()  # its collectives carry checkpoint.deadline
        return self._error


def _random_states() -> dict[str, Any]:
    """The states of all generators of this process: Python's, numpy's, torch's and Megatron's model-parallel ones."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "model_parallel": get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    """The inverse of `_random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["model_parallel"])


def _random_file(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def _room(root: Path) -> str:
    """Where checkpoints go, and how much fits there."""
    try:
        return f"{root}: {shutil.disk_usage(root).free / 2**30:.2f} GiB free"
    except OSError:
        return str(root)

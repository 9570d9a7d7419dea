"""When and how a run saves and resumes; all ranks call every method together."""

from __future__ import annotations

import json
import logging
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_laser.config.schema import RunConfig
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint import optimizer_state, sharded
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.policy import Policy
from megatron_laser.trainer.runtime import Runtime
from megatron_laser.trainer.transport import broadcast_arrays

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves `policy` with the run's state, and brings both back."""

    def __init__(self, config: RunConfig, runtime: Runtime, policy: Policy) -> None:
        self._settings = config.checkpoint
        self._root = Path(config.checkpoint.folder or Path(config.run.output_dir) / "checkpoints")
        self._runtime = runtime
        self._policy = policy
        self._identity = _model_identity(policy)
        # A group of its own: the writing thread's collectives must not mix with the main thread's.
        self._group = dist.new_group(backend="gloo") if config.checkpoint.asynchronous else runtime.cpu_group
        self._writer: _Writer | None = None

    def due(self, step: int, last_step: int) -> bool:
        """Whether the run saves after `step`."""
        every = self._settings.every
        return every > 0 and (step % every == 0 or step == last_step)

    def save(self, step: int, run_state: dict[str, Any] | None) -> bool:
        """Save after `step`; `run_state` (rank 0's cursor and the like) is stored beside the weights.

        Returns False, after logging why, when it could not be written (disk full, read-only folder): the last
        published checkpoint is untouched. With `checkpoint.asynchronous` this is known at the next call.
        """
        succeeded = self.wait()
        entries = sharded.build_state(self._policy)
        state = {
            "step": step,
            "optimizer_step": optimizer_state.get_step(self._policy.optimizer),
            "scheduler": self._policy.scheduler.state_dict(),
            "model": self._identity,
            "world_size": self._runtime.world_size,
            "run": run_state,
        }
        if self._settings.asynchronous:
            entries = sharded.staged(entries)
        random_states = _random_states()
        self._writer = _Writer(lambda: self._write(step, entries, state, random_states))
        if self._settings.asynchronous:
            self._writer.start()
            return succeeded
        self._writer.run()
        return self.wait()

    def wait(self) -> bool:
        """Wait for a save that is under way; whether it succeeded on every rank (True when there is none)."""
        if self._writer is None:
            return True
        error = self._writer.finish()
        self._writer = None
        failed = torch.tensor([error is not None], dtype=torch.int64)
        dist.all_reduce(failed, group=self._runtime.cpu_group)
        if error is not None:
            logger.error("the checkpoint was not saved; the last published one stays valid: %s", error)
        return int(failed) == 0

    def resume(self) -> dict[str, Any] | None:
        """Load the newest published checkpoint; its state, on every rank, or None when there is none.

        Raises:
            CheckpointError: it belongs to another model, is damaged or too new.
        """
        path = self._newest()
        if path is None:
            return None
        state = folders.read_state(path)
        if state["model"] != self._identity:
            raise CheckpointError(
                f"checkpoint {path} is of another model: {_differences(state['model'], self._identity)}; "
                "choose another run.output_dir or the model it was trained from"
            )
        if self._settings.verify:
            folders.verify(path, part=self._runtime.rank, parts=self._runtime.world_size)
        sharded.load_state(self._policy, path, state["optimizer_step"])
        self._policy.scheduler.load_state_dict(state["scheduler"])
        if state["world_size"] == self._runtime.world_size:
            _restore_random_states(torch.load(path / _random_file(self._runtime.rank), weights_only=False))
        return state

    def _newest(self) -> Path | None:
        """Rank 0's choice: file systems of different nodes may disagree for a moment."""
        step = -1
        if self._runtime.is_main:
            found = folders.published(self._root)
            folders.remove_partials(self._root)
            step = found[-1][0] if found else -1
        step = int(broadcast_arrays({"step": np.array(step)}, self._runtime)["step"])
        return None if step < 0 else folders.partial_folder(self._root, step).with_suffix("")

    def _write(
        self, step: int, entries: dict[str, Any], state: dict[str, Any], random_states: dict[str, Any]
    ) -> None:
        partial = folders.partial_folder(self._root, step)
        rank = self._runtime.rank
        _everywhere(lambda: partial.mkdir(parents=True) if rank == 0 else None, self._group)
        sharded.save_state(entries, partial, self._group)
        files: list[Any] = [None] * self._runtime.world_size

        def own_files() -> dict[str, list[Any]]:
            torch.save(random_states, partial / _random_file(rank))
            return folders.digests(partial, f"__{rank}_") | folders.digests(partial, _random_file(rank))

        dist.all_gather_object(files, _everywhere(own_files, self._group), group=self._group)

        def publish() -> None:
            if rank != 0:
                return
            listed = {name: digest for part in files for name, digest in part.items()}
            for shared in ("common.pt", "metadata.json", ".metadata"):
                listed |= folders.digests(partial, shared)
            folders.publish(partial, state, listed)
            folders.retain(
                self._root, keep_last=self._settings.keep_last, keep_every=self._settings.keep_every
            )

        _everywhere(publish, self._group)


class _Writer:
    """One save, in this thread or in another; keeps its error for `finish`."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self.run, name="checkpoint-writer")
        self._thread.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error

    def finish(self) -> Exception | None:
        if self._thread is not None:
            self._thread.join()  # its collectives carry run.deadline
        return self._error


def _everywhere(work: Any, group: dist.ProcessGroup) -> Any:
    """Run `work` on every rank; if it fails on one, every rank raises instead of waiting for it."""
    result, trouble = None, None
    try:
        result = work()
    except Exception as error:
        trouble = f"rank {dist.get_rank()}: {error}"
    troubles: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(troubles, trouble, group=group)
    if any(troubles):
        raise CheckpointError("; ".join(text for text in troubles if text))
    return result


def _model_identity(policy: Policy) -> dict[str, Any]:
    g, hf = policy.chunks.geometry, policy.chunks.hf
    return {
        "model_type": hf.model_type,
        "num_layers": g.num_layers,
        "hidden_size": g.hidden,
        "intermediate_size": g.ffn,
        "heads": g.heads,
        "kv_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "vocab_size": g.vocab,
        "tied": bool(hf.tie_word_embeddings),
        "dtype": str(policy.chunks.config.params_dtype).removeprefix("torch."),
    }


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    keys = [key for key in ours if theirs.get(key) != ours[key]]
    return ", ".join(
        f"{key} {json.dumps(theirs.get(key))} there, {json.dumps(ours[key])} here" for key in keys
    )


def _random_file(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "model_parallel": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["model_parallel"])

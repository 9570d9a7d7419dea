"""What a run keeps of its model on the way: checkpoints and exports. All ranks call each function together."""

from __future__ import annotations

from megatron_laser.run.colocation import MemoryPhase
from megatron_laser.run.export import FINAL, export_hf
from megatron_laser.run.setup import Run
from megatron_laser.trainer.checkpoint.folder import CheckpointError


def save(run: Run, step: int) -> None:
    """Checkpoint weights, optimizer and rank 0's state; the files may still be written when this returns."""
    controller = run.ranks.controller
    saving = run.ranks.phase(f"saving step {step}")
    with run.timers("checkpoint"), saving, run.colocation.during(MemoryPhase.SAVE, run.ranks):
        run.checkpoints.save(step, None if controller is None else controller.state())


def wait_for_save(run: Run) -> bool:
    """Wait for the checkpoint that is being written; whether the newest one is on the disk."""
    with run.ranks.phase("waiting for the last save"):
        return run.checkpoints.wait()


def save_and_stop(run: Run, step: int, reason: str, *, always: bool = False) -> None:
    """Save, so that the same command continues after `step`; unless nothing was trained since the last save."""
    wait_for_save(run)
    new = always or not run.ranks.is_saved(step)
    if new:
        save(run, step)
    if not wait_for_save(run):
        raise CheckpointError(f"stopping after step {step} ({reason}): {run.checkpoints.trouble}")
    run.ranks.run_on_controller("stopping", lambda rank0: rank0.recorder.record_stop(step, reason, saved=new))
    if not always:
        run.ranks.stopping.stopped(step, reason)


def export(run: Run, step: int, name: str = FINAL) -> str:
    """Write the weights of `step` as the Hugging Face folder `name`; "" or what went wrong."""
    with run.colocation.during(MemoryPhase.SYNC, run.ranks), run.ranks.phase("export"):
        weights, is_main = run.trainer.weight_stream(), run.ranks.runtime.is_main
        signals = run.ranks.stopping.signals
        own_failure = export_hf(run.config, weights, signals, is_main=is_main, step=step, name=name)
        return run.ranks.broadcast_text(own_failure)

"""The training loop: the whole system on one page.

Every rank runs `train`; rank 0 also has a `Controller`: prompts, rollout engine, graders, metrics. One step is

    rollout   rank 0 has the engine generate and grades what comes; the others wait on the store
    share     the finished batch goes to every rank as flat arrays
    train     old-policy pass, scores, advantages, optimizer steps: Megatron's schedules on all ranks
    sync      the new weights go to the engine as one stream of Hugging Face tensors
    evaluate  when due: the validation split, on the engine
    record    metrics, dumps of rollouts, live view
    keep      when due, or when it is the best: weights, optimizer, cursor; published by one rename

so generation for step n + 1 uses the weights of step n (strictly on-policy), or, with `rollout.ahead: 1`, those of
step n - 1, and then overlaps with the training of step n.

A function given to `on_rank_zero` runs there alone. When it finds servers that lost their weights (one was started
again), all ranks sync, and it is called once more. `CannotGoOn` is raised on every rank at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_laser.config.process_environment import is_main_process
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.evaluation.keeping import End
from megatron_laser.evaluation.validation import evaluation_due
from megatron_laser.model import platform
from megatron_laser.run.colocation import MemoryPhase
from megatron_laser.run.controller import Controller
from megatron_laser.run.engines import STOPPED, WorkResult, uses_servers
from megatron_laser.run.ranks import CannotGoOn, RunEnded, StopRequested
from megatron_laser.run.saving import export, save, save_and_stop, wait_for_save
from megatron_laser.run.setup import Run, open_run
from megatron_laser.run.stop_signals import answering_signals
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.weight_sync import sync_weights

_SYNC_ATTEMPTS = 3


def train(config: RunConfig, *, overwrite: bool = False) -> Path:
    """Run `config` from its first step to its last, or until it is asked to stop. Call on every rank.

    Returns the output folder.
    """
    answering = answering_signals(speaks=is_main_process())
    with answering as signals, open_run(config, signals=signals, overwrite=overwrite) as run:
        if run is not None:  # None: all its steps were done before
            try:
                end = run_steps(run)
            except StopRequested as stop:
                end = None
                save_and_stop(run, stop.step, stop.reason)
            except CannotGoOn as error:
                save_and_stop(run, error.step, error.reason, always=True)
                raise RunEnded(f"saved after step {error.step} and stopped: {error.reason}") from None
            if end is not None:
                finish(run, end)
    return Path(config.run.output_dir)


def run_steps(run: Run) -> End | None:
    """All steps that are left, or as many as `run.early_stop` leaves; None where somebody asked to stop before that."""
    if run.needs_sync:
        sync(run, run.first_step - 1)
    on_rank_zero(run, "first evaluation", run.first_step - 1, Controller.evaluate_first)
    step = run.first_step - 1
    if stop_if_requested(run, step):
        return None
    early = keep(run, step)
    while not early and step < run.config.run.steps:
        step += 1
        with run.windows.step(step):  # with logging.profile, or where somebody asks for it: a profiler
            run_step(run, step)
        if stop_if_requested(run, step):
            return None
        early = keep(run, step)
    return End(step, early if step < run.config.run.steps else "")


def run_step(run: Run, step: int) -> None:
    """One rollout batch: generate and grade, train, sync, evaluate when due, record."""
    platform.reset_peak_memory()
    platform.trim_host_memory(step)  # every few steps
    lost: CannotGoOn | None = None
    with run.timers("total"):
        on_rank_zero(run, f"rollout of step {step}", step - 1, lambda rank0: rank0.collect(step))
        batch = run.ranks.share_batch()
        if run.ranks.controller is not None:
            run.ranks.controller.start_ahead(step + 1)  # with rollout.ahead: while this step trains
        # On shared GPUs servers offload and the trainer onloads; `sync` gives them back. Elsewhere this does nothing.
        run.colocation.switch_to(MemoryPhase.TRAIN, run.ranks)
        with run.ranks.phase(f"train step {step}"):
            run.drift.hold(batch, step)  # with laser.drift_every: of the first step's responses
            result = run.trainer.train_step(batch, step)
            result.metrics.update(run.drift.measure(step, result))
        try:
            if run.config.rollout.ahead:
                on_rank_zero(run, f"rollout ahead of step {step + 1}", step, Controller.finish_ahead)
            if run.keeps_syncing:
                sync(run, step)
        except CannotGoOn as error:
            lost = error  # the step itself is complete: it is recorded before the run stops
    times = run.timers.collect()
    result.metrics.update(run.stragglers.add(step, times))
    run.timeline.add(step)
    if lost is None and evaluation_due(run.config, step):
        try:
            on_rank_zero(run, f"evaluation after step {step}", step, lambda rank0: rank0.evaluate(step))
        except CannotGoOn as error:
            lost = error
    on_rank_zero(run, f"recording step {step}", step, lambda rank0: rank0.record(step, result, times))
    run.ranks.stopping.recorded(step)
    if lost is not None:
        raise lost


def on_rank_zero(run: Run, phase: str, last_step: int, work: Callable[[Controller], WorkResult]) -> None:
    """Rank 0 does `work`, the others wait; raises CannotGoOn when it comes to that.

    `last_step` is complete: servers that came back without weights are given the trainer's, which are of that step.
    """
    run.ranks.run_or_stop(phase, last_step, work, sync=lambda: sync(run, last_step))


def sync(run: Run, version: int) -> None:
    """Give the engine the trained weights; again, to the servers that are left, when one dies on the way."""
    failure = ""
    for _ in range(_SYNC_ATTEMPTS):
        if uses_servers(run.config):
            on_rank_zero(run, "waiting for servers", version, Controller.await_servers)
        run.colocation.switch_to(MemoryPhase.SYNC, run.ranks)
        with run.timers("sync"), run.ranks.phase(f"weight sync of step {version}"):
            own_failure = sync_weights(run.trainer.weight_stream(), run.ranks.engine, version=version)
            failure = run.ranks.broadcast_text(own_failure)
        failure = failure or run.colocation.switch_to(MemoryPhase.GENERATE, run.ranks)
        if not failure:
            return
    raise CannotGoOn(version, f"{_SYNC_ATTEMPTS} weight syncs in a row failed: {failure}")


def keep(run: Run, step: int) -> str:
    """Save and export what is due after `step`, or the best so far; why the run ends here, "" when it goes on."""
    judged = run.ranks.judged(step)
    if judged.best or run.checkpoints.due(step, ends=bool(judged.stop)):
        save(run, step)
    if name := run.ranks.export_due(step, resumed=step < run.first_step):
        export(run, step, name)  # a failure is logged
    return judged.stop


def stop_if_requested(run: Run, step: int) -> bool:
    """Save after `step` and return True when a signal on any rank, or `run.time_limit`, asked to stop."""
    run.ranks.stopping.check_limit(step, evaluation=evaluation_due(run.config, step + 1))
    reason = run.ranks.coordinator.agree_to_stop(step)
    if reason is not None:
        save_and_stop(run, step, reason)
    return reason is not None


def finish(run: Run, end: End) -> None:
    """Export the trained model, evaluate it on the test split, write the report."""
    saved, steps = wait_for_save(run), end.step
    failure = export(run, steps) if run.config.checkpoint.export_hf else ""
    if saved and failure.startswith(STOPPED):
        return save_and_stop(run, steps, failure.removeprefix(STOPPED))
    try:
        complete = saved and not failure
        on_rank_zero(run, "final evaluation", steps, lambda rank0: rank0.evaluate_last(end))
        on_rank_zero(run, "final report", steps, lambda rank0: rank0.finish(end, complete=complete))
    except StopRequested as stop:
        return save_and_stop(run, steps, stop.reason)
    except CannotGoOn as error:
        failure = failure or error.reason
    if not saved:
        raise CheckpointError(f"all steps are done, but the last save failed: {run.checkpoints.trouble}")
    if failure:
        raise RunEnded(f"all {steps} steps are done: {failure}; the same command goes on here")
    run.ranks.stopping.finished()

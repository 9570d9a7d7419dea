"""Whether an output folder and its checkpoints are those of the run that is to write there. Reads only."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.observability.quantities import utc_now
from megatron_laser.observability.run_record import Change, changes_in
from megatron_laser.run.branching import Origin, find_origin, is_branch_of, resume_folder, resume_step
from megatron_laser.run.changes import undone
from megatron_laser.run.compared_settings import (
    Difference,
    Settings,
    differences,
    listed,
    raw_differences,
    recorded_settings,
)
from megatron_laser.run.going_back import checkpoint_of
from megatron_laser.trainer.checkpoint import folder as checkpoints
from megatron_laser.trainer.checkpoint import ownership
from megatron_laser.trainer.checkpoint.ownership import RUN, Owner, same_folder

FINISHED = "FINISHED"


@dataclass(frozen=True)
class OutputState:
    """What an output folder holds of the run that is to write into it.

    record: of the run, None for a new one. finished: the steps after which it has finished, None if it has not.
    planned: the run.steps that it ended before, by the same run.early_stop as today; None where it did not.
    step: of the checkpoint that it goes on from; None: it begins. changes: what it has otherwise than that checkpoint
    was trained with; before: the same settings as they were, as run.json has them. back_to: it goes back to this step.
    branch: what it begins with, where that is another run's.
    """

    record: dict[str, Any] | None
    finished: int | None
    planned: int | None = None
    step: int | None = None
    changes: tuple[Change, ...] = ()
    before: Settings = field(default_factory=dict)
    back_to: int | None = None
    branch: Origin | None = None

    def is_done(self, steps: int) -> bool:
        """Whether the run has finished its `steps`, and nothing is left to do."""
        return self.finished is not None and steps <= (self.planned or self.finished)


def check_output_folder(
    config: RunConfig, again: Owner | None = None, *, change: bool = False
) -> OutputState:
    """Compare `run.output_dir`, which need not exist, with the run. Writes nothing.

    Args:
        again: the run, if it had claimed the folder before.
        change: it may go on with other settings of what is learned (`--change`).

    Raises:
        ConfigError: it belongs to another run, holds a finished one that cannot go on, or there is no such checkpoint
            as `run.resume` names. CheckpointError: that cannot be read.
    """
    folder = Path(config.run.output_dir)
    record = _record(config, folder, again)
    named, back_to = (resume_folder(config), resume_step(config)) if again is None else (None, None)
    begun = saved_steps(config)
    if named is not None and (record is None or (not begun and is_branch_of(record, named))):
        return _branch(config, named, record)
    if record is None:
        if back_to is not None:
            raise ConfigError([f"run.resume step {back_to}: run.output_dir {folder} holds no run"])
        return OutputState(None, *finished_steps(config, folder))
    if named is not None and not is_branch_of(record, named):
        before = record.get("branched_from")
        what = "a run that is no branch" if before is None else f"a branch of {before.get('folder')}"
        raise ConfigError(
            [
                f"run.output_dir {folder} holds {what}, and run.resume names {named}; choose another run.output_dir "
                "for the new branch, or run.resume: auto to go on with the run that is there"
            ]
        )
    if back_to is not None:
        if record.get("went_back") == config.run.resume:
            back_to = None  # it was carried out, and the run goes on from there
        else:
            checkpoint_of(checkpoints.checkpoint_root(config), back_to)
    step = back_to if back_to is not None else begun[-1] if begun else None
    finished, planned = finished_steps(config, folder) if back_to is None else (None, None)
    state = _same_run(
        config, record, step, change=change, finished=finished, planned=planned, back_to=back_to
    )
    if again is not None and record.get("id") != again.id:
        raise ConfigError(
            [f"run.output_dir {folder} was deleted under a live run, and holds another one by now"]
        )
    # With run.epochs it is asked again once the data has been read.
    if finished is not None and config.run.steps_known and not state.is_done(config.run.steps):
        _check_continues(config, folder, finished)
    return state


def check_new(config: RunConfig) -> None:
    """Look at what a new run in the place of one that `--overwrite` moves aside would go on from. Writes nothing.

    Raises:
        ConfigError: it is what would be moved, or cannot be branched from.
    """
    named, folder = resume_folder(config), Path(config.run.output_dir)
    if (back_to := resume_step(config)) is not None:
        raise ConfigError(
            [
                f"run.resume step {back_to} goes back in the run that --overwrite would move aside; leave one out"
            ]
        )
    if named is None:
        return
    origin = _branch(config, named, None).branch
    if origin is not None and same_folder(origin.folder, folder):
        raise ConfigError(
            [f"run.resume {named} is a run that --overwrite would move aside; choose another run.output_dir"]
        )


def saved_steps(config: RunConfig) -> list[int]:
    """The steps of the run's checkpoints, oldest first."""
    return [step for step, _ in checkpoints.published(checkpoints.checkpoint_root(config))]


def check_checkpoints(config: RunConfig, state: OutputState, again: Owner | None = None) -> Owner:
    """The run as its checkpoints name it, once the folder of its checkpoints is known to be its own. Writes nothing.

    Raises:
        ConfigError: the folder is another run's. CheckpointError: the newest checkpoint cannot be read.
    """
    record = state.record
    root = checkpoints.checkpoint_root(config)
    output_dir = str(config.run.output_dir)
    run_id = again.id if again is not None else None if record is None else record.get("id")
    if run_id is None:  # a new run, or one of an earlier version, which gave runs no id
        there = ownership.read_owner(root)
        nothing_to_lose = record is not None or not checkpoints.published(root)
        if there is not None and same_folder(there.output_dir, output_dir) and nothing_to_lose:
            run_id = there.id  # a start that was cut off had given it one already
    owner = Owner(run_id or uuid.uuid4().hex, output_dir, str(root))
    ownership.check_owner(root, owner, earlier=record is not None and "id" not in record)
    ownership.check_left_behind(None if record is None else record.get("checkpoints"), root, owner)
    return owner


def early_end(config: RunConfig) -> dict[str, Any]:
    """What FINISHED holds besides the step of a run that has ended early."""
    return {"steps": config.run.steps, "early_stop": config.run.early_stop.model_dump(mode="json")}


def finished_steps(config: RunConfig, folder: Path) -> tuple[int | None, int | None]:
    """`finished` and `planned` of `OutputState`.

    Raises:
        ConfigError: FINISHED is damaged.
    """
    file = folder / FINISHED
    if not file.exists():
        return None, None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        early = found.get("early_stop") == early_end(config)["early_stop"]
        return int(found["step"]), int(found["steps"]) if early else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); delete it to go on with the run"]) from error


def _check_continues(config: RunConfig, folder: Path, finished: int) -> None:
    """Without a checkpoint a finished run would begin anew and overwrite what it has measured."""
    root = checkpoints.checkpoint_root(config)
    if not checkpoints.published(root):
        raise ConfigError(
            [
                f"run.output_dir {folder} holds a finished run of {finished} steps and {root} no checkpoint to go on "
                f"from to run.steps {config.run.steps}; {_WAYS}"
            ]
        )


def _record(config: RunConfig, folder: Path, again: Owner | None) -> dict[str, Any] | None:
    """Of the run in `folder`; None when there is none."""
    if not (folder / RUN).exists():
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(
                [f"run.output_dir {folder} holds metrics of an unknown run (no {RUN}); {_WAYS}"]
            )
        return None
    if config.run.resume == "never" and again is None:
        raise ConfigError([f"run.output_dir {folder} already holds a run and run.resume is never; {_WAYS}"])
    return read_record(folder)


def _same_run(
    config: RunConfig,
    record: dict[str, Any],
    step: int | None,
    *,
    change: bool,
    finished: int | None,
    planned: int | None,
    back_to: int | None,
) -> OutputState:
    """The run of `record`, continued from `step` with the settings of `config`."""
    folder = Path(config.run.output_dir)
    theirs = undone(recorded_settings(record), record.get("undo", ()), step or 0)
    found = differences(theirs, config, record.get("contents") or {})
    # What a start before this one was allowed to, and has not saved a checkpoint with yet.
    allowed = [(one.key, one.after) for one in changes_in(record) if one.step > (step or 0)]
    other = [one for one in found if one.changing.kind == "identity"]
    asked = [
        one
        for one in found
        if one.changing.kind == "learning" and not change and (one.key, one.here) not in allowed
    ]
    problems = []
    if other:
        problems.append(
            f"run.output_dir {folder} belongs to another run: {listed(other)}; {_ways(folder, other)}"
        )
    if asked:
        problems.append(
            f"run.output_dir {folder} holds this run with other settings of what is learned: {listed(asked)}; pass "
            f"--change to go on with them from step {(step or 0) + 1} on (run.json then says so), or choose another "
            f"run.output_dir and run.resume={folder} for a branch"
        )
    if problems:
        raise ConfigError(problems)
    return OutputState(
        record,
        finished,
        planned,
        step=step,
        changes=_changes(found, step),
        before=raw_differences(theirs, config),
        back_to=back_to,
    )


def _branch(config: RunConfig, named: Path, record: dict[str, Any] | None) -> OutputState:
    """A run of its own that begins with the state of another."""
    origin = find_origin(named)
    if origin.step > config.run.steps:
        raise ConfigError(
            [
                f"run.resume {named}: {origin.checkpoint} is of step {origin.step}, beyond run.steps "
                f"{config.run.steps}; raise run.steps, or name an earlier checkpoint"
            ]
        )
    # That folder itself is refused elsewhere, in other words with --overwrite than without.
    inner = not same_folder(origin.folder, config.run.output_dir)
    for place in (origin.folder, origin.checkpoint.parent):
        if inner and Path(os.path.realpath(config.run.output_dir)).is_relative_to(os.path.realpath(place)):
            raise ConfigError(
                [
                    f"run.output_dir {config.run.output_dir} lies in {place}, of the run that run.resume names and "
                    "that a branch only reads; choose a run.output_dir beside it"
                ]
            )
    theirs = undone(recorded_settings(dict(origin.record)), origin.record.get("undo", ()), origin.step)
    found = differences(theirs, config, origin.record.get("contents") or {})
    refused = [one for one in found if one.changing.kind == "identity" and not one.changing.branch]
    if refused:
        raise ConfigError(
            [
                f"run.resume {named}: a branch of the run in {origin.folder} cannot go on from its checkpoint of step "
                f"{origin.step} with other values: {listed(refused)}; give them those of that run, or start a new run "
                "(to begin with the weights alone, convert the checkpoint and name the folder as model.path)"
            ]
        )
    return OutputState(
        record,
        None,
        step=origin.step,
        changes=_changes(found, origin.step),
        before=raw_differences(theirs, config),
        branch=origin,
    )


def _changes(found: Sequence[Difference], step: int | None) -> tuple[Change, ...]:
    time = utc_now()
    return tuple(
        Change((step or 0) + 1, one.key, one.there, one.here, one.changing.kind, time) for one in found
    )


def _ways(folder: Path, found: Sequence[Difference]) -> str:
    """What to do about settings that make another run."""
    if all(one.changing.branch for one in found):
        return f"{_WAYS}; a branch may have them, too: another run.output_dir and run.resume={folder}"
    return _WAYS


def read_record(folder: Path) -> dict[str, Any]:
    """What an output folder says of its run: name, started, settings, id, checkpoints.

    Raises:
        ConfigError: it cannot be read.
    """
    file = folder / RUN
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for key in record["settings"]:
            _section, _key = key.split(".", 1)
        undone({}, record.get("undo", ()), 0)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); {_WAYS}"]) from error
    return dict(record)


_WAYS = "choose another run.output_dir, or pass --overwrite to move the old folder aside"

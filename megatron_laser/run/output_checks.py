"""Whether an output folder and its checkpoints are those of the run that is to write there. Reads only."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.run.readout_identity import comparable
from megatron_laser.trainer.checkpoint import folder as checkpoints
from megatron_laser.trainer.checkpoint import ownership
from megatron_laser.trainer.checkpoint.ownership import RUN, Owner, same_folder

FINISHED = "FINISHED"
# What may change between the start of a run and its continuation: it decides where and how fast things run,
# how long and how talkative, but not what is learned from which data.
_MAY_CHANGE = {
    "model": {
        *("recompute", "recompute_layers", "offload_activations", "layers", "attention", "keep_logits_gib"),
    },
    "parallel": None,
    "batching": None,
    "checkpoint": None,
    "logging": None,
    "alarms": None,
    "evaluation": None,
    "run": {
        "name",
        "steps",
        "output_dir",
        "resume",
        "deadline",
        "start_grace",
        "max_bad_steps",
        "epochs",
        "early_stop",
    },
    "policy": {"mismatch_abort"},
    "laser": {"max_unscored_steps", "drift_every", "drift_samples"},
    "rollout": {
        *("deadline", "max_concurrency_per_server", "min_servers", "servers_deadline", "sglang"),
        *("weight_sync", "sync_folder", "sync_bucket_mib", "sync_flatten", "sync_deadline", "sync_address"),
        *("verify_sync", "function_deadline"),
    },
    "reward": {"workers", "deadline"},
    "optimizer": {
        "distributed",
        "offload",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "gradient_accumulation_fusion",
    },
    "data": {"validation", "test"},
}


@dataclass(frozen=True)
class OutputState:
    """What an output folder holds of the run that is to write into it.

    record: of the run, None for a new one. finished: the steps after which it has finished, None if it has not.
    planned: the run.steps that it ended before, by the same run.early_stop as today; None where it did not.
    """

    record: dict[str, Any] | None
    finished: int | None
    planned: int | None = None

    def is_done(self, steps: int) -> bool:
        """Whether the run has finished its `steps`, and nothing is left to do."""
        return self.finished is not None and steps <= (self.planned or self.finished)


def check_output_folder(config: RunConfig, again: Owner | None = None) -> OutputState:
    """Compare `run.output_dir`, which need not exist, with the run. Writes nothing.

    Args:
        again: the run, if it had claimed the folder before.

    Raises:
        ConfigError: it belongs to another run, or holds a finished one that cannot go on.
    """
    folder = Path(config.run.output_dir)
    record = _same_run(config, folder, again)
    finished, planned = _finished_step(config, folder)
    state = OutputState(record, finished, planned)
    # With run.epochs it is asked again once the data has been read.
    if finished is not None and config.run.steps_known and not state.is_done(config.run.steps):
        _check_continues(config, folder, finished)
    return state


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


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run this run, as {"section.key": value}."""
    settings = {}
    for section, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            if not _may_change(section, key):
                settings[f"{section}.{key}"] = value
    return settings


def _default(key: str) -> Any:
    """Of a setting "section.key", as JSON; None for one that has none."""
    section, name = key.split(".", 1)
    fields: Any = RunConfig.model_fields[section].annotation
    value = fields.model_fields[name].get_default(call_default_factory=True)
    return None if value is PydanticUndefined else to_jsonable_python(value)


def _may_change(section: str, key: str) -> bool:
    free = _MAY_CHANGE.get(section, set())
    return free is None or key in free


def early_end(config: RunConfig) -> dict[str, Any]:
    """What FINISHED holds besides the step of a run that has ended early."""
    return {"steps": config.run.steps, "early_stop": config.run.early_stop.model_dump(mode="json")}


def _finished_step(config: RunConfig, folder: Path) -> tuple[int | None, int | None]:
    """`finished` and `planned` of `OutputState`."""
    file = folder / FINISHED
    if not file.exists():
        return None, None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        early = found.get("early_stop") == early_end(config)["early_stop"]
        return int(found["step"]), int(found["steps"]) if early else None
    except (ValueError, KeyError, TypeError) as error:
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


def _same_run(config: RunConfig, folder: Path, again: Owner | None) -> dict[str, Any] | None:
    """The record of the run in `folder`, which is the one of `config`; None when there is none."""
    file = folder / RUN
    if not file.exists():
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(
                [f"run.output_dir {folder} holds metrics of an unknown run (no {RUN}); {_WAYS}"]
            )
        return None
    if config.run.resume == "never" and again is None:
        raise ConfigError([f"run.output_dir {folder} already holds a run and run.resume is never; {_WAYS}"])
    record = read_record(folder)
    # What an earlier version wrote down may be free to change by now.
    theirs = {key: value for key, value in record["settings"].items() if not _may_change(*key.split(".", 1))}
    ours = identity(config)
    # A setting that an earlier version did not have is as it was: what it does by default.
    theirs = {key: _default(key) for key in ours} | theirs
    theirs, ours = comparable(theirs, ours)
    changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if changed:
        listed = ", ".join(
            f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in changed[:5]
        )
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ConfigError([f"run.output_dir {folder} belongs to another run: {listed}{more}; {_WAYS}"])
    if again is not None and record.get("id") != again.id:
        raise ConfigError(
            [f"run.output_dir {folder} was deleted under a live run, and holds another one by now"]
        )
    return record


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
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); {_WAYS}"]) from error
    return dict(record)


_WAYS = "choose another run.output_dir, or pass --overwrite to move the old folder aside"

"""What a start would do with the output folder that is there, in lines for the dry run. Reads only, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_laser.config import ConfigError, RunConfig
from megatron_laser.errors import UserError
from megatron_laser.run.output_checks import OutputState, check_checkpoints, check_new, check_output_folder
from megatron_laser.run.own_files import check_own

REFUSED = "the run would be refused"
"""What a line begins with that says why it would be."""


def folder_lines(config: RunConfig, *, overwrite: bool, change: bool) -> Iterator[str]:
    """What would be resumed, changed, moved aside or refused; nothing where nothing is there.

    Args:
        overwrite, change: as given to `train`.
    """
    folder = Path(config.run.output_dir)
    try:
        if overwrite:
            check_own(folder)
            check_new(config)
            if folder.exists():
                yield f"run.output_dir {folder} would be moved aside"
            return
        state = check_output_folder(config, change=change)
        if not state.is_done(config.run.steps):
            check_checkpoints(config, state)
    except ConfigError as error:
        for problem in error.problems:
            yield f"{REFUSED}: {problem}"
        return
    except UserError as error:
        yield f"{REFUSED}: {error}"
        return
    text = _text(config, state)
    if text:
        yield f"run.output_dir {folder} {text}"
    for one in state.changes:
        yield f"changed: {one.text}"


def _text(config: RunConfig, state: OutputState) -> str:
    if state.branch is not None:
        return f"would be a branch of the run in {state.branch.folder} after its step {state.branch.step}"
    if state.record is None:
        return ""
    if state.is_done(config.run.steps):
        return f"holds this run, which has finished its {state.finished} steps: nothing is left to do"
    if state.back_to is not None:
        return (
            f"holds this run, which would go back to step {state.back_to}; what came after it is moved aside"
        )
    return f"holds this run, which would go on from {'its beginning' if state.step is None else f'step {state.step}'}"

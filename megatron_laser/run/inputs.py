"""The user's files, read and checked on rank 0 before any model is built."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laser.config import RunConfig
from megatron_laser.config.derived import data_sources
from megatron_laser.config.modes import generates
from megatron_laser.data import Cursor, MixedCursor, MixedSource, PromptCursor, fingerprint
from megatron_laser.data.epochs import epoch_words, with_steps
from megatron_laser.errors import Finding
from megatron_laser.observability.best_effort import print_line
from megatron_laser.run.earlier_start import LastStart, read_last_start
from megatron_laser.run.output_folder import ClaimedFolder, claim_output_folder
from megatron_laser.run.preflight import FindingLog, run_preflight
from megatron_laser.run.preflight.finding_log import one_line
from megatron_laser.trainer.held_responses import HeldResponses, read_held
from megatron_laser.types import Prompt

logger = logging.getLogger(__name__)

_HELD = "held/"


@dataclass(frozen=True)
class RunInputs:
    """The user's files, read and checked before any model is built.

    data_fingerprints: of each training source. steps: `run.steps`, given or of `run.epochs`. held: what the run kept
    of its first rollouts (`laser.drift_every`). rows: of the files, by split, those that are left out too. last_start:
    what is in the folder of the run's last one.
    """

    tokenizer: Any
    train: list[Prompt]
    validation: list[Prompt] | None
    test: list[Prompt] | None
    score_token_id: int | None
    stop_token_ids: tuple[int, ...]
    data_fingerprints: tuple[str, ...]
    folder: ClaimedFolder
    steps: int
    held: HeldResponses | None = None
    rows: dict[str, int] = field(default_factory=dict)
    last_start: LastStart | None = None

    def shared_arrays(self) -> dict[str, np.ndarray]:
        """What the other ranks need of it; -1 stands for no score token."""
        score = -1 if self.score_token_id is None else self.score_token_id
        finished = np.array(self.folder.finished)
        held = {} if self.held is None else self.held.to_arrays()
        return {
            "score_token_id": np.array(score, dtype=np.int64),
            "finished": finished,
            "steps": np.array(self.steps, dtype=np.int64),
            **{f"{_HELD}{name}": array for name, array in held.items()},
        }


def settled(config: RunConfig, shared: dict[str, np.ndarray]) -> RunConfig:
    """`config` with the steps of rank 0's `shared_arrays`, where it has epochs."""
    if config.run.steps_known:
        return config
    run = config.run.model_copy(update={"steps": int(shared["steps"]), "epochs": None})
    return config.model_copy(update={"run": run})


def shared_held(shared: dict[str, np.ndarray]) -> HeldResponses | None:
    """The held responses of rank 0's `shared_arrays`; None where it has none."""
    arrays = {name.removeprefix(_HELD): array for name, array in shared.items() if name.startswith(_HELD)}
    return HeldResponses.from_arrays(arrays) if arrays else None


def read_inputs(config: RunConfig, *, overwrite: bool = False, change: bool = False) -> RunInputs:
    """Look at everything that the run starts from, as `megatron-laser check` does, and claim the output folder.

    Warnings and notes are logged.

    Args:
        overwrite: move a run that is in the output folder aside, once nothing else stops this one.
        change: the run may go on with other settings of what is learned.

    Raises:
        UserError: the first error, with the setting or the file and line that is wrong.
    """
    log = FindingLog(stop_at_errors=True, on_finding=_log)
    looked = run_preflight(config, log, overwrite=overwrite, change=change)
    model, prompts = looked.model, looked.data.prompts
    assert model.special is not None  # errors have ended this by now
    keys = [config.data.prompt_key, config.data.answer_key]
    sources = data_sources(config, "train") if generates(config) else ()
    given, config = config, with_steps(config, len(prompts.get("train", ())))
    if words := epoch_words(given, config.run.steps):
        print_line(words)
    data_fingerprints = tuple(fingerprint(source.paths, keys) for source in sources)
    last_start = None if overwrite else read_last_start(Path(config.run.output_dir))
    folder = claim_output_folder(
        config, change=change, overwrite=overwrite, data_fingerprints=data_fingerprints
    )
    for moved in folder.moved:
        print_line(f"moved the existing {moved.what} to {moved.to}")
    try:
        held = None if folder.finished else read_held(config)
    except BaseException:
        folder.release()
        raise
    return RunInputs(
        tokenizer=model.tokenizer,
        train=prompts.get("train", []),
        validation=prompts.get("validation"),
        test=prompts.get("test"),
        score_token_id=model.special.score_token_id,
        stop_token_ids=model.special.stop_token_ids,
        data_fingerprints=data_fingerprints,
        folder=folder,
        steps=config.run.steps,
        held=held,
        rows={split: len(rows) for split, rows in looked.data.rows.items()},
        last_start=last_start,
    )


def open_cursor(config: RunConfig, inputs: RunInputs) -> Cursor:
    """The order of the training prompts: of one source its own, of several each source's share in turn."""
    seed, shuffle = config.run.seed, config.data.shuffle
    sources = data_sources(config, "train")
    if len(sources) == 1:
        (data,) = inputs.data_fingerprints
        return PromptCursor(len(inputs.train), seed, shuffle, data_fingerprint=data)
    counts = Counter(prompt.source for prompt in inputs.train)
    return MixedCursor(
        [
            MixedSource(
                source.name,
                source.share,
                PromptCursor(counts[source.name], seed, shuffle, data_fingerprint=data, stream=place),
            )
            for place, (source, data) in enumerate(zip(sources, inputs.data_fingerprints, strict=True))
        ]
    )


def _log(finding: Finding) -> None:
    if finding.level == "warning":
        logger.warning("%s", one_line(finding))
    elif finding.level == "note":
        logger.info("%s", one_line(finding))

"""All checks of what a run starts from, in the order in which they depend on each other."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laser.config import RunConfig
from megatron_laser.config.modes import generates
from megatron_laser.data.epochs import with_most_steps
from megatron_laser.data.readers import Row
from megatron_laser.data.tokenizer import load_tokenizer
from megatron_laser.errors import Finding
from megatron_laser.rewards import reward_rule
from megatron_laser.rewards.trial import trial
from megatron_laser.rollout.function.loading import function_findings
from megatron_laser.run.preflight.batches import batch_findings
from megatron_laser.run.preflight.data import GROUP as DATA
from megatron_laser.run.preflight.data import DataInputs, Progress, epoch_findings, read_data, tokenize_data
from megatron_laser.run.preflight.finding_log import FindingLog, needed
from megatron_laser.run.preflight.machine import GROUP as MACHINE
from megatron_laser.run.preflight.machine import (
    check_disks,
    check_folders,
    check_layers,
    check_machine,
    check_server_start,
)
from megatron_laser.run.preflight.model import GROUP as MODEL
from megatron_laser.run.preflight.model import ModelInputs, check_model, check_tokenizer
from megatron_laser.run.preflight.objectives import forced_findings, objective_findings, readout_findings

REWARD = "Reward"
_TOKENIZER_PROBES = 16


@dataclass
class PreflightResult:
    """What was read on the way, so that nobody reads it again."""

    model: ModelInputs
    data: DataInputs


def run_preflight(
    config: RunConfig,
    log: FindingLog,
    progress: Progress = lambda split, done, total: None,
    *,
    overwrite: bool = False,
    change: bool | None = None,
) -> PreflightResult:
    """Check everything; what was found goes into `log`.

    Reads, and writes nothing. A run in which nobody generates has no data or graders, and a tokenizer for dumps
    with tokens alone.

    Quick checks come first, so that a run that cannot start says so soon.

    Args:
        overwrite: a run that is in the output folder will be moved aside, and may be any.
        change: whether a run that is there may go on with other settings of what is learned; None: it is only asked,
            and what differs is said.

    Raises:
        UserError: the first error, where `log.stop_at_errors`.
    """
    config = with_most_steps(config)
    check_server_start(config, log)
    model = check_model(config, log)
    check_layers(config, log)
    check_machine(config, log)
    if not check_folders(config, log, overwrite=overwrite, change=change):
        check_disks(config, model, log, overwrite=overwrite)
    if not generates(config):
        with log.topic(REWARD, "objective"):
            log.add(REWARD, objective_findings(config))
        with log.topic(MODEL, "readouts"):
            log.add(MODEL, readout_findings(config, model))
            log.add(MODEL, forced_findings(config, model))
        with log.topic(DATA, "batches"):
            log.add(DATA, batch_findings(config, model))
        if (
            config.run.mode == "train_only"
            and config.logging.rollouts_every
            and config.logging.rollouts_tokens
        ):
            with log.topic(MODEL, "tokenizer"):  # for the dumps alone
                model.tokenizer = load_tokenizer(config.model.path)
        return PreflightResult(model, DataInputs())
    data = read_data(config, log)
    examples = dict(data.examples())
    for function in examples or [config.reward.function]:
        with log.topic(REWARD, "reward function"):
            log.add(REWARD, _tried(config, function, examples.get(function)))
    with log.topic(REWARD, "rollout function"):
        log.add(REWARD, function_findings(config))
    with log.topic(REWARD, "objective"):
        log.add(REWARD, objective_findings(config))
    with log.topic(MODEL, "readouts"):
        log.add(MODEL, readout_findings(config, model))
        log.add(MODEL, forced_findings(config, model))
    with log.topic(MODEL, "tokenizer"):
        needed(model.vocabulary, "config.json")  # without it, or with a broken file, that is said by now
        probes = [row.problem for row in data.rows.get("train", [])[:_TOKENIZER_PROBES]]
        model.tokenizer = load_tokenizer(config.model.path, probes)
    check_tokenizer(config, model, log)
    tokenize_data(config, model, data, log, progress)
    with log.topic(DATA, "run.epochs"):
        log.add(DATA, epoch_findings(config, data))
    return PreflightResult(model, data)


def _tried(config: RunConfig, function: str, row: Row | None) -> list[Finding]:
    """A trial of one verifier with the run's settings, on a row of its data where there is one."""
    settings = config.reward
    return trial(
        function,
        example=row,
        deadline=settings.deadline,
        rule=reward_rule(settings),
        memory_limit_gib=settings.memory_limit_gib,
        max_processes=settings.max_processes,
    )


ORDER = (MODEL, DATA, REWARD, MACHINE)
"""In which groups are shown."""

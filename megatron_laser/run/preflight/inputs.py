"""All looks at what a run starts from, in the order in which they depend on each other."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laser.config import RunConfig
from megatron_laser.data.tokenizer import load_tokenizer
from megatron_laser.rewards.trial import trial
from megatron_laser.run.preflight.data_inputs import GROUP as DATA
from megatron_laser.run.preflight.data_inputs import DataInputs, Progress, look_at_data, read_data
from megatron_laser.run.preflight.ledger import Ledger, needed
from megatron_laser.run.preflight.machine import GROUP as MACHINE
from megatron_laser.run.preflight.machine import (
    look_at_disks,
    look_at_folders,
    look_at_layers,
    look_at_servers,
)
from megatron_laser.run.preflight.model_inputs import GROUP as MODEL
from megatron_laser.run.preflight.model_inputs import ModelInputs, look_at_model, look_at_tokenizer

REWARD = "Reward"
_TOKENIZER_PROBES = 16


@dataclass
class Looked:
    """What was read on the way, so that nobody reads it again."""

    model: ModelInputs
    data: DataInputs


def look(
    config: RunConfig,
    ledger: Ledger,
    progress: Progress = lambda split, done, total: None,
    *,
    overwrite: bool = False,
) -> Looked:
    """Look at everything; what was found goes into `ledger`.

    Reads, and writes nothing. Quick looks come first, so that a run that cannot start says so soon.

    Args:
        overwrite: a run that is in the output folder will be moved aside, and may be any.

    Raises:
        UserError: the first error, where `ledger.stop_at_errors`.
    """
    look_at_servers(config, ledger)
    model = look_at_model(config, ledger)
    look_at_layers(config, ledger)
    if not look_at_folders(config, ledger, overwrite=overwrite):
        look_at_disks(config, model, ledger, overwrite=overwrite)
    data = read_data(config, ledger)
    with ledger.topic(REWARD, "reward function"):
        answers = [row.answer for row in data.rows.get("train", [])[:1]]
        ledger.add(REWARD, trial(config.reward.function, *answers, deadline=config.reward.deadline))
    with ledger.topic(MODEL, "tokenizer"):
        needed(model.vocabulary, "config.json")  # without it, or with a broken file, that is said by now
        probes = [row.problem for row in data.rows.get("train", [])[:_TOKENIZER_PROBES]]
        model.tokenizer = load_tokenizer(config.model.path, probes)
    look_at_tokenizer(config, model, ledger)
    look_at_data(config, model, data, ledger, progress)
    return Looked(model, data)


ORDER = (MODEL, DATA, REWARD, MACHINE)
"""In which groups are shown."""

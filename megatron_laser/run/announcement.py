"""The facts of a start, gathered on rank 0 from what is open by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.config import RunConfig, read_architecture
from megatron_laser.model import platform
from megatron_laser.model.transformer_engine import use_transformer_engine
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.engine import RolloutEngine
from megatron_laser.run.banner import Resumed, SplitFacts, StartFacts, split_facts, start_facts
from megatron_laser.run.earlier_start import branch_of, changes_since
from megatron_laser.run.inputs import RunInputs
from megatron_laser.trainer.checkpoint.manager import CheckpointManager


def gather_facts(
    config: RunConfig,
    inputs: RunInputs,
    engine: RolloutEngine | None,
    ranks: int,
    resumed: Mapping[str, Any] | None,
    checkpoints: CheckpointManager,
    edited: Sequence[str],
) -> StartFacts:
    """What the banner says.

    Args:
        engine: None where nobody generates.
        resumed: the checkpoint's state, as `checkpoints` has loaded it; None for a start from the beginning.
        edited: files of the code that grades, which are not as the checkpoint had them.
    """
    folder, last = Path(config.run.output_dir), inputs.last_start
    servers = (
        [member.client.url for member in engine.fleet.members] if isinstance(engine, SglangEngine) else []
    )
    goes_on = None
    if resumed is not None:
        goes_on = Resumed(
            step=int(resumed["step"]),
            path=str(checkpoints.loaded),
            converted=resumed["run"] is None,
            done_before=0 if last is None else last.last_step,
            passed_over=list(checkpoints.passed_over),
            branched_from=branch_of(folder),
        )
    return start_facts(
        config,
        read_architecture(config.model.path),
        ranks=ranks,
        device=platform.device_name(),
        layers="Transformer Engine" if use_transformer_engine(config.model.layers) else "torch",
        score_token_id=inputs.score_token_id,
        data=_data(config, inputs),
        servers=servers,
        resumed=goes_on,
        earlier=None if last is None else last.earlier,
        changes=changes_since(last, config, folder),
        edited=edited,
        nothing_saved=() if resumed is not None else checkpoints.passed_over,
        notes=inputs.folder.told,
    )


def _data(config: RunConfig, inputs: RunInputs) -> list[SplitFacts]:
    found = []
    for split, read in inputs.rows.items():
        prompts = getattr(inputs, split, None) or ()
        most = None if split == "train" else config.evaluation.max_prompts
        found.append(split_facts(config, split, read, (prompt.source for prompt in prompts), most))
    return found

"""`megatron-laser replay`: one batch that a run skipped, alone on one process, with every number shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.config import load_config, needs_reference_model
from megatron_laser.config.model_folder.continuation import longest_trained
from megatron_laser.config.process_environment import read_place
from megatron_laser.config.readouts import readouts
from megatron_laser.data import DataError
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model.hf_folder import HfFolder
from megatron_laser.model.weights import load_weights
from megatron_laser.trainer.bad_steps import Dump, read_dump
from megatron_laser.trainer.checkpoint import folder as checkpoints
from megatron_laser.trainer.checkpoint import sharded_state
from megatron_laser.trainer.forward_backward import OptimizerStep, run_forward
from megatron_laser.trainer.policy import Policy
from megatron_laser.trainer.step_metrics import ROWS_KEY, TOKEN_MEAN_KEYS, ratio
from megatron_laser.trainer.trainer import Trainer

# The batch is the run's, the layout is one process; what is computed does not depend on it.
_ONE_PROCESS = (
    *(
        f"parallel.{name}=1"
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    ),
    "parallel.sequence=false",
    "parallel.stage_layers=even",
    "optimizer.moments_dtype=float32",
    *(f"optimizer.{name}=false" for name in ("distributed", "overlap_grad_reduce", "overlap_param_gather")),
)
_SHOWN_SAMPLES = 20


@dataclass(frozen=True)
class Replay:
    """lines: what to print. bad: a loss or gradient was not finite again."""

    lines: list[str]
    bad: bool


def replay(folder: Path, weights: Path | None = None) -> Replay:
    """Run the dumped batch in `folder` once, with its warm-up phase, on this process. Writes nothing.

    Args:
        weights: a Hugging Face folder or a published checkpoint folder; None takes the newest checkpoint that
            the dump names, if it is still there, else the initial model.

    Raises:
        DataError, CheckpointError: the dump or the weights cannot be used.
    """
    if read_place().world_size > 1:
        raise DataError("replay runs on one process: start it without torchrun")
    dump = read_dump(folder)
    weights = _weights(dump, weights)
    trained = load_config(dump.config)
    # One rank has room for what the run's context ranks shared, but takes no more than it must.
    budget = max(trained.batching.tokens_per_micro_batch, longest_trained(trained))
    overrides = [*_ONE_PROCESS, f"batching.tokens_per_micro_batch={budget}"]
    is_hf = not _is_checkpoint(weights)
    if is_hf and not needs_reference_model(trained):
        overrides.append(f"model.path={weights}")  # the initial model need not exist any more
    config = load_config(dump.config, overrides)
    runtime = runtimes.start(config)
    try:
        trainer = Trainer(config, runtime, score_token_id=dump.meta["score_token_id"])
        _load(trainer.policy, weights, is_hf=is_hf)
        flat, step = dump.flat, int(dump.meta["step"])
        faults = list(_faults(trainer, flat, [readout.name for readout in readouts(config)]))
        updates = trainer.run_batch(flat, step).updates
    finally:
        runtimes.stop()
    bad = any(update.bad for update in updates)
    lines = [
        f"step {step}: {flat.num_samples} samples in {len(set(flat.group_ids.tolist()))} groups, "
        f"{len(flat.tokens)} tokens",
        f"kept because: {dump.meta['reason']}",
        f"weights: {weights} (the run's were those after step {flat.weight_version})",
        *(line for update in updates for line in _update_lines(update)),
        "first numbers that are not finite, by sample:",
        *(f"  {fault}" for fault in faults[:_SHOWN_SAMPLES]),
    ]
    if len(faults) > _SHOWN_SAMPLES:
        lines.append(f"  and {len(faults) - _SHOWN_SAMPLES} more samples")
    if not faults:
        lines.append("  none in log-probs and scores")
    lines.append("result: bad again" if bad else "result: every loss and gradient is finite")
    return Replay(lines, bad)


def _weights(dump: Dump, weights: Path | None) -> Path:
    if weights is None:
        named = dump.meta.get("newest_checkpoint")
        weights = Path(named) if named and _is_checkpoint(Path(named)) else Path(dump.meta["initial_model"])
    if not (_is_checkpoint(weights) or (weights / "config.json").is_file()):
        raise DataError(
            f"weights {weights}: expected a Hugging Face folder (config.json) or a checkpoint's step folder "
            "(state.json); name one with --weights"
        )
    return weights.resolve()


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _load(policy: Policy, weights: Path, *, is_hf: bool) -> None:
    if is_hf:
        chunks = policy.chunks
        with HfFolder(weights) as source:
            load_weights(chunks.models, source, chunks.hf, chunks.geometry)
        policy.optimizer.reload_model_params()
        return
    state = checkpoints.read_state(weights)
    checkpoints.verify(weights)
    sharded_state.load_state(policy, weights, state["optimizer_step"])


def _update_lines(update: OptimizerStep) -> Iterator[str]:
    fate = f"skipped: {', '.join(update.bad)} not finite" if update.bad else "taken"
    yield f"epoch {update.epoch}, minibatch {update.minibatch}: {fate}"
    names = sorted({name for entry in update.entries for name in entry})
    for name in names:
        values = [float(entry[name]) for entry in update.entries if name in entry]
        value = max(values) if name.startswith("max_") else sum(values)
        if name in TOKEN_MEAN_KEYS:
            value = ratio(value, sum(float(entry[ROWS_KEY]) for entry in update.entries))
        yield f"  {name:20s} {value:.6g}"
    yield f"  {'grad_norm':20s} {update.grad_norm:.6g}"


def _faults(trainer: Trainer, flat: FlatBatch, readouts: Sequence[str]) -> Iterator[str]:
    """One line for each sample with a number that is not finite, in the order of the samples; `readouts`: names."""
    data = trainer.prepare(flat)
    found: dict[int, list[str]] = {}

    def note(sample: int, values: np.ndarray, what: str) -> None:
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            first = int(wrong[0])
            token = int(flat.response_ids(sample)[first])
            found.setdefault(sample, []).append(
                f"{what} is {values[first]:g} at response token {first} (id {token})"
            )

    outputs = run_forward(trainer.policy.chunks, data.micro_batches, lambda batch: batch.without_entropy())
    for batch, output in zip(data.micro_batches, outputs, strict=True):
        logprobs, owners = output[0][batch.policy_rows].cpu().numpy(), batch.policy_sample.cpu().numpy()
        for sample in np.unique(owners).tolist():
            note(sample, logprobs[owners == sample], "the log-prob")
        scores = output[0][batch.score_rows].cpu()
        for sample, readout, value in zip(
            batch.score_sample.tolist(), batch.score_readout.tolist(), scores.tolist(), strict=True
        ):
            if not np.isfinite(value):
                whose = "the score token's" if readout == 0 else f"of readout {readouts[readout]!r} a token's"
                found.setdefault(sample, []).append(f"{whose} log-prob is {value:g}")
    ends = flat.response_offsets
    for sample in range(flat.num_samples):
        note(sample, flat.rollout_logprobs[ends[sample] : ends[sample + 1]], "the engine's log-prob")
    for sample in sorted(found):
        yield f"sample {sample} (group {int(flat.group_ids[sample])}): {'; '.join(found[sample])}"

"""Batches on the disk, as they were trained on: written by a run, read by `run.mode: train_only`.

    batches/step_12.npz     the arrays of `FlatBatch`, and what a `RolloutBatch` has besides: plain numbers, no pickle
    batches/step_12.json    who made it and how (`origin`), prompts, texts, outcomes, counts, the checksum of the .npz

The .json is written last, so a batch is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.distributed.broadcast import save_arrays
from megatron_laser.errors import DataError
from megatron_laser.files import write_atomically
from megatron_laser.rollout.pending import sample_from, sample_state
from megatron_laser.types import (
    OF_TERMS,
    Generation,
    Group,
    Prompt,
    RolloutBatch,
    Sample,
    TokenSets,
    WeightSpan,
)

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d+)\.json")
_REASONS = ("stop", "length", "abort", "ended")
_UNKNOWN = -1  # of a flag that is not given
_MORE = "sample/"

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class RecordedBatch:
    """batch: with the step and the weight version of the run that made it. progress: the epochs that its cursor was at.
    origin: of that run, see `batch_origin.origin_of`."""

    batch: RolloutBatch
    progress: dict[str, float]
    origin: dict[str, Any]


def write_batch(
    folder: Path, batch: RolloutBatch, progress: Mapping[str, float], origin: Mapping[str, Any]
) -> None:
    """Write a batch to `folder`, in place of an earlier one of its step.

    Raises:
        OSError: it cannot be written; an earlier one may be gone then, and a part of a new one never counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays, description = _taken_apart(batch)
    buffer = io.BytesIO()
    save_arrays(buffer, arrays)
    content = buffer.getvalue()
    header = {
        "format_version": FORMAT_VERSION,
        "step": batch.step,
        "weight_version": batch.weight_version,
        "sha256": hashlib.sha256(content).hexdigest(),
        "origin": dict(origin),
        "progress": dict(progress),
        "metrics": batch.metrics,
        **description,
    }
    text = json.dumps(header, ensure_ascii=False) + "\n"  # NaN stays NaN: Python reads it back
    _json(folder, batch.step).unlink(missing_ok=True)
    write_atomically(_json(folder, batch.step).with_suffix(".npz"), content)
    write_atomically(_json(folder, batch.step), text)


def recorded_steps(folder: Path) -> list[int]:
    """The steps whose batches are complete in `folder`, in order; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def read_origin(folder: Path, step: int) -> dict[str, Any]:
    """Who made a batch and how, without its arrays. Raises DataError when its .json cannot be used."""
    return dict(_header(folder, step)["origin"])


def read_batch(folder: Path, step: int) -> RecordedBatch:
    """A batch of `recorded_steps`, as it was.

    Raises:
        DataError: it is missing, damaged, or of a later version; names the file.
    """
    header, file = _header(folder, step), _json(folder, step).with_suffix(".npz")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != header["sha256"]:
        raise DataError(
            f"{file} is damaged: its bytes are not those that {_json(folder, step).name} names; copy both again"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        batch = _put_together(header, arrays)
    except (ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} and {_json(folder, step).name} do not belong together: {error!r}") from error
    return RecordedBatch(batch, dict(header["progress"]), dict(header["origin"]))


def _json(folder: Path, step: int) -> Path:
    return folder / f"step_{step}.json"


def _header(folder: Path, step: int) -> dict[str, Any]:
    file = _json(folder, step)
    try:
        header: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = int(header["format_version"])
        if version <= FORMAT_VERSION:
            for name in ("step", "weight_version", "sha256", "origin", "progress", "metrics", "groups"):
                header[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read as a recorded batch: {error!r}") from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"{file} has format {version}, this version of megatron_laser reads up to {FORMAT_VERSION}; upgrade "
            "megatron_laser"
        )
    return header


def _taken_apart(batch: RolloutBatch) -> tuple[Arrays, dict[str, Any]]:
    """The arrays, and groups as JSON values."""
    samples = list(batch.samples())
    generations = [sample.generation for sample in samples]
    spans = [generation.spans for generation in generations]
    more: Arrays = {
        # Not as the trainer gets them, in float32: metrics are made of these.
        "reward": np.array([sample.reward for sample in samples], np.float64),
        "zc_logprob": np.array([_number(sample.zc_logprob) for sample in samples], np.float64),
        "engine_zc_logprob": np.array([_number(g.zc_logprob) for g in generations], np.float64),
        "finish_reason": np.array([_REASONS.index(g.finish_reason) for g in generations], np.int8),
        "cut_off": np.array([_flag(g.cut_off) for g in generations], np.int8),
        "weight_version": np.array([g.weight_version for g in generations], np.int64),
        "spans": np.array([len(own) for own in spans], np.int32),
        "span_versions": np.array([span.version for own in spans for span in own], np.int64),
        "span_tokens": np.array([span.tokens for own in spans for span in own], np.int64),
        "has_sampled": np.array([g.sampled is not None for g in generations], np.bool_),
        "has_sets": np.array([g.sets is not None for g in generations], np.bool_),
        "routed_shape": np.array(_routed_shape(generations), np.int32),
    }
    groups = [
        {
            "prompt": {
                name: value for name, value in asdict(group.prompt).items() if name != "columns" or value
            },
            "texts": [sample.text for sample in group.samples],
            "outcomes": [sample.outcome for sample in group.samples],
            "ungraded": [sample_state(sample) for sample in group.ungraded],
            **_of_terms(group.samples),
        }
        for group in batch.groups
    ]
    return flatten(batch).to_arrays() | {_MORE + name: array for name, array in more.items()}, {
        "groups": groups
    }


def _of_terms(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """What rewards of several terms have besides, of each sample; {} of others."""
    found = {name: [getattr(sample, name) for sample in samples] for name in OF_TERMS}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _put_together(header: Mapping[str, Any], arrays: Arrays) -> RolloutBatch:
    more = {name.removeprefix(_MORE): arrays[name] for name in arrays if name.startswith(_MORE)}
    flat = FlatBatch.from_arrays({n: array for n, array in arrays.items() if not n.startswith(_MORE)})
    generations = iter(list(_generations(flat, more)))
    place, groups = 0, []
    for item in header["groups"]:
        prompt = Prompt(**item["prompt"])
        samples = []
        for number, (text, outcome) in enumerate(zip(item["texts"], item["outcomes"], strict=True)):
            samples.append(
                Sample(
                    prompt_ids=prompt.token_ids,
                    generation=next(generations),
                    text=text,
                    scored=bool(flat.scored[place]),
                    reward=float(more["reward"][place]),
                    outcome=outcome,
                    zc_logprob=_known(more["zc_logprob"][place]),
                    **{name: item[name][number] for name in OF_TERMS if name in item},
                )
            )
            place += 1
        groups.append(Group(prompt, samples, [sample_from(saved, prompt) for saved in item["ungraded"]]))
    if place != flat.num_samples:
        raise ValueError(f"{place} texts for {flat.num_samples} samples")
    return RolloutBatch(header["step"], header["weight_version"], groups, dict(header["metrics"]))


def _generations(flat: FlatBatch, more: Arrays) -> Iterator[Generation]:
    first_span = np.concatenate(([0], np.cumsum(more["spans"], dtype=np.int64)))
    layers, experts = more["routed_shape"].tolist()
    for index in range(flat.num_samples):
        own = slice(*flat.response_offsets[index : index + 2].tolist())
        routed = flat.routed_experts[slice(*flat.routed_offsets[index : index + 2].tolist())]
        versions, tokens = (
            more[name][slice(*first_span[index : index + 2].tolist())].tolist()
            for name in ("span_versions", "span_tokens")
        )
        yield Generation(
            response_ids=flat.response_ids(index).copy(),
            logprobs=flat.rollout_logprobs[own].copy(),
            finish_reason=_REASONS[int(more["finish_reason"][index])],  # type: ignore[arg-type]
            weight_version=int(more["weight_version"][index]),
            zc_logprob=_known(more["engine_zc_logprob"][index]),
            spans=tuple(WeightSpan(*pair) for pair in zip(versions, tokens, strict=True)),
            routed_experts=routed.reshape(len(routed), layers, experts).copy() if len(routed) else None,
            sampled=flat.sampled[own].copy() if more["has_sampled"][index] else None,
            sets=_sets(flat, own) if more["has_sets"][index] else None,
            cut_off=None if more["cut_off"][index] == _UNKNOWN else bool(more["cut_off"][index]),
        )


def _sets(flat: FlatBatch, own: slice) -> TokenSets:
    ids = slice(int(flat.set_offsets[own.start]), int(flat.set_offsets[own.stop]))
    return TokenSets(flat.set_counts[own].copy(), flat.set_ids[ids].copy())


def _routed_shape(generations: Sequence[Generation]) -> tuple[int, int]:
    """(layers, experts of a token), of all alike; (0, 0) where nobody told."""
    shapes = (g.routed_experts.shape[1:] for g in generations if g.routed_experts is not None)
    layers, experts = next(shapes, (0, 0))
    return layers, experts


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _known(value: np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _flag(value: bool | None) -> int:
    return _UNKNOWN if value is None else int(value)

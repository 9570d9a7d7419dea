"""The readouts of a run as the trainer uses them: token ids, points of a batch, scores, labels, class counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_laser.algorithms.readouts import group_shrunk_labels, readout_scores
from megatron_laser.algorithms.self_reward import class_weights
from megatron_laser.batching import readout_points as places
from megatron_laser.batching.flat import FlatBatch
from megatron_laser.batching.readout_points import ReadoutPoints
from megatron_laser.config import read_architecture, resolve_score_token
from megatron_laser.config.model_folder.continuation import continuation_problems
from megatron_laser.config.readouts import Readout, forced_text, readout_setting, readouts
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.data.delimiters import Delimiter
from megatron_laser.data.tokenizer import load_tokenizer, text_ids
from megatron_laser.errors import ConfigError

Place = Callable[[FlatBatch, int], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class ReadoutScores:
    """What one readout read of a batch, on the scale of its targets; all [points].

    sample, offset: as in `ReadoutPoints`. scores: float32. of_responses: at most one for each response; else of
    prefixes.
    """

    name: str
    of_responses: bool
    sample: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    scores: torch.Tensor

    def of_samples(self, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [samples], NaN where there is none, and [samples] bool where there is one); none of prefixes."""
        scores, scored = torch.full((samples,), torch.nan), torch.zeros(samples, dtype=torch.bool)
        if self.of_responses:
            place = torch.from_numpy(self.sample)
            scores[place], scored[place] = self.scores, True
        return scores, scored


def readings_by_sample(
    found: Sequence[ReadoutScores], samples: int
) -> list[dict[str, list[tuple[int, float | None]]]]:
    """[samples] {readout: (offset into the response, score) of each place}; None: the score is not finite."""
    readings: list[dict[str, list[tuple[int, float | None]]]] = [{} for _ in range(samples)]
    for readout in found:
        for sample, offset, score in zip(
            readout.sample.tolist(), readout.offset.tolist(), readout.scores.tolist(), strict=True
        ):
            value = score if math.isfinite(score) else None
            readings[sample].setdefault(readout.name, []).append((offset, value))
    return readings


@dataclass(frozen=True)
class PointTensors:
    """Per point of the rollout batch, on the device, all readouts one after the other.

    labels: [points] float32, what the score is trained towards, 0 to 1. right: [points] bool. reference_logprobs:
    [points] float32, c_ref. slot_points: [slots] int64, the point of each slot.
    """

    labels: torch.Tensor
    right: torch.Tensor
    reference_logprobs: torch.Tensor
    slot_points: torch.Tensor


class RunReadouts:
    """All readouts of a run, the response's score first."""

    def __init__(
        self,
        specs: Sequence[Readout],
        token_ids: Sequence[tuple[int, ...]],
        where: Sequence[Place],
        continuation: Sequence[int] = (),
    ) -> None:
        """`continuation`: what stands behind responses that were cut off, for the positions `forced`."""
        self.specs = tuple(specs)
        self.token_ids = tuple(token_ids)
        self._where = tuple(where)
        self._continuation = tuple(continuation)

    @classmethod
    def of(cls, config: RunConfig, score_token_id: int | None) -> RunReadouts:
        """Of a configuration, in which `score_token_id` is the first token of the first one; None: there are none.

        Raises:
            ConfigError: a token that the tokenizer does not know, or outside the vocabulary; or a forced text that
                cannot stand behind a response.
        """
        if score_token_id is None:
            return cls((), (), ())
        specs = readouts(config)
        known: dict[int | str, int] = (
            {specs[0].tokens[0]: score_token_id} if specs and specs[0].tokens else {}
        )
        ids = [
            tuple(
                _token_id(config, readout_setting(config, index, "tokens"), token, known)
                for token in spec.tokens
            )
            for index, spec in enumerate(specs)
        ]
        if specs and not specs[0].tokens:  # given to the trainer alone
            ids = [own or (score_token_id,) for own in ids]
        continuation = _continuation(config, {token for own in ids for token in own})
        return cls(specs, ids, [_place(config, spec, len(continuation)) for spec in specs], continuation)

    def __len__(self) -> int:
        return len(self.specs)

    def points(self, flat: FlatBatch) -> ReadoutPoints:
        """What is read of a batch."""
        return places.readout_points(flat, self._where, self.token_ids, self._continuation)

    def class_weights(
        self, flat: FlatBatch, points: ReadoutPoints, members: npt.NDArray[np.int64]
    ) -> tuple[tuple[int, ...], tuple[tuple[float, float], ...]]:
        """Of the samples `members` of one optimizer step: each readout's points, and weights of right and wrong."""
        counts, weights = [], []
        for index, spec in enumerate(self.specs):
            own = points.sample[points.of(index)]
            own = own[np.isin(own, members)]
            right = int((flat.rewards[own] > 0.5).sum())
            counts.append(len(own))
            weights.append(class_weights(right, len(own) - right) if spec.class_weights else (1.0, 1.0))
        return tuple(counts), tuple(weights)

    def scores(
        self, points: ReadoutPoints, logprobs: torch.Tensor, reference: torch.Tensor
    ) -> list[ReadoutScores]:
        """Of every readout.

        Args:
            logprobs: [slots]. reference: [points] c_ref, see `references`.
        """
        found = []
        for index, spec in enumerate(self.specs):
            own = points.of(index)
            read = logprobs[points.slots_of(index)].reshape(-1, len(self.token_ids[index]))
            scores = readout_scores(
                read, kind=spec.score, beta=spec.beta, ref_logprob=reference[own], targets=spec.targets
            )
            found.append(
                ReadoutScores(spec.name, spec.of_responses, points.sample[own], points.offset[own], scores)
            )
        return found

    def first_logprobs(
        self, points: ReadoutPoints, logprobs: torch.Tensor | None, samples: int
    ) -> torch.Tensor:
        """[samples] the log-prob of the first readout's first token, NaN where it was not read (`logprobs` None)."""
        result = torch.full((samples,), torch.nan)
        if self.specs and logprobs is not None:
            place = torch.from_numpy(points.sample[points.of(0)])
            result[place] = logprobs[points.slots_of(0)][:: len(self.token_ids[0])]
        return result

    def references(self, points: ReadoutPoints, model_logprobs: torch.Tensor | None) -> torch.Tensor:
        """c_ref of every point, [points] float32: with `laser.reference: model` that model's log-prob of the first
        token (`model_logprobs` [slots]), else the constant; 0 where the score needs none."""
        result = torch.zeros(len(points.sample))
        for index, spec in enumerate(self.specs):
            if model_logprobs is not None and spec.reference == "model":
                read = model_logprobs[points.slots_of(index)].reshape(-1, len(self.token_ids[index]))
                result[points.of(index)] = read[:, 0]
            elif spec.ref_logprob is not None:
                result[points.of(index)] = spec.ref_logprob
        return result

    def tensors(
        self, flat: FlatBatch, points: ReadoutPoints, reference: torch.Tensor, device: torch.device
    ) -> PointTensors:
        """What the loss needs of every point."""
        labels = torch.zeros(len(points.sample))
        rewards = torch.from_numpy(flat.rewards.astype(np.float32))
        groups = torch.from_numpy(flat.group_ids.astype(np.int64))
        for index, spec in enumerate(self.specs):
            own = points.of(index)
            sample = torch.from_numpy(points.sample[own])
            if spec.target == "prefix_value":
                values = places.prefix_values(flat, points.sample[own], points.offset[own])
                labels[own] = torch.from_numpy(values).float()
            elif spec.target == "group_shrunk":
                labels[own] = group_shrunk_labels(rewards, groups, gamma=spec.gamma).float()[sample]
            else:
                labels[own] = rewards[sample]
        sizes = [
            np.repeat(np.arange(points.of(i).start, points.of(i).stop), len(ids))
            for i, ids in enumerate(self.token_ids)
        ]
        slot_points = np.concatenate([np.zeros(0, np.int64), *sizes]).astype(np.int64)
        right = rewards[torch.from_numpy(points.sample)] > 0.5
        found = (labels, right, reference, torch.from_numpy(slot_points))
        return PointTensors(*(tensor.to(device) for tensor in found))


def _token_id(config: RunConfig, setting: str, token: int | str, known: dict[int | str, int]) -> int:
    if token in known:
        return known[token]
    found = token if isinstance(token, int) else resolve_score_token(config.model.path, token).id
    vocab = read_architecture(config.model.path).vocab_size
    if found is None or not 0 <= found < vocab:
        raise ConfigError([f"{setting}: token {token!r} is none of the model's; expected one below {vocab}"])
    return found


def _continuation(config: RunConfig, read: set[int]) -> tuple[int, ...]:
    """The ids of the forced text; () where no readout has one."""
    text = forced_text(config)
    if not text:
        return ()
    ids = text_ids(load_tokenizer(config.model.path, [text]), text)
    if problems := continuation_problems(config, read_architecture(config.model.path), ids, read):
        raise ConfigError(problems)
    return ids


def _place(config: RunConfig, spec: Readout, forced_tokens: int = 0) -> Place:
    if spec.position == "eos":
        return places.at_end
    if spec.position == "before_eos":
        return places.before_end
    if spec.position == "every":
        return places.every(spec.every)
    if spec.position == "forced":
        return places.behind_forced(forced_tokens)
    tokenizer = load_tokenizer(config.model.path)
    vocab_size = read_architecture(config.model.path).vocab_size
    delimiter = Delimiter.of_tokenizer(spec.delimiter, tokenizer, vocab_size)

    def behind(flat: FlatBatch, sample: int) -> npt.NDArray[np.int64]:
        found = delimiter.ends(flat.response_ids(sample))
        return found[found < flat.response_lengths[sample]]

    return behind

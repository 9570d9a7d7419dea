"""One micro-batch of samples as one packed sequence, with its labelled rows.

This is the only place where labels are shifted. Row t predicts token t + 1: the last prompt row is labelled
y_1, rows y_1 .. y_{T-1} are labelled y_2 .. y_T, and the EOS row of a scored response is labelled with the
score token z_c, at temperature 1 (LaSeR, arXiv 2510.14943: the score is log pi(z_c | x, y, EOS)).

Samples of one group can share their prompt: all its tokens but the last are packed once, as a sequence of their own,
and behind it, for each response, the prompt's last token and the response, which attend to that sequence and to
themselves. Repeating that one token keeps every labelled row one sample's. What all prompts of a micro-batch begin
with (a system prompt, worked examples) is packed once as well, and the rest of each prompt stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_laser.batching.shared_prompts import common_beginning

_PADDING_TOKEN = 0  # any id: padding is a sequence of its own, or behind one, and has no label


class Marks(NamedTuple):
    """Rows of a sample beside those that predict its tokens; each [rows] int64.

    offset: behind how many tokens of the response, 0 to all, and of what is appended; not decreasing for one readout.
    label: what is read there. slot: the row's number among all that are read of the batch.
    """

    offset: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackInput:
    """One sample. Ids are int arrays (fast) or lists; `scored` as in `Sample.scored`.

    group: samples of equal number have one and the same prompt; None: nothing is known. marks: what is read of it in
    place of one score token at the end. sampled: [response tokens] bool, which of them the policy sampled; None: all.
    appended: ids behind the response that are there for marks alone: no row predicts one of them.
    """

    sample_index: int
    prompt_ids: npt.NDArray[np.integer] | Sequence[int]
    response_ids: npt.NDArray[np.integer] | Sequence[int]
    scored: bool
    group: int | None = None
    marks: Marks | None = None
    sampled: npt.NDArray[np.bool_] | None = None
    appended: npt.NDArray[np.integer] | Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """T tokens of n sequences (the last may be padding) and their R labelled rows, in packed order.

    tokens, position_ids: [T] int64; positions start at 0 in every sequence.
    cu_seqlens: [n + 1] int32, the first token of each sequence, then T. max_seqlen: the longest sequence. Both count
    the padding that a sequence got for context parallelism; under it, the arrays of tokens and rows may be one rank's
    share (`context.context_shard`), and these two are of the whole all the same.
    row_index: [R] int64, position of the labelled row in `tokens`; increasing, strictly where no place has two labels.
    labels: [R] int64. is_score: [R] bool, True where the label is a score token. slot: [R] int64, which of all that are
    read (`Marks.slot`; the sample's index for a score token at the end), -1 on the other rows.
    sample_index: [R] int64. response_position: [R] int64, t (from 0) of the row labelled with
    response_ids[t], and on score rows how many tokens of the response, and of what is appended, are before the place.
    inv_temperature: [R] float32, the policy's on policy rows and 1 on score rows.
    parents: [n] int64, of each sequence an earlier one that its tokens attend to as well, whole and before themselves,
    together with that one's own parents. -1: none. Positions go on from it, and `max_seqlen` counts it. None where
    nothing is shared.
    """

    tokens: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    max_seqlen: int
    row_index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    is_score: npt.NDArray[np.bool_]
    slot: npt.NDArray[np.int64]
    sample_index: npt.NDArray[np.int64]
    response_position: npt.NDArray[np.int64]
    inv_temperature: npt.NDArray[np.float32]
    parents: npt.NDArray[np.int64] | None = None


def pack(
    sequences: list[PackInput],
    *,
    score_token_id: int | None,
    pad_multiple: int,
    inv_temperature: float,
    context_size: int = 1,
    share_prompts: bool = False,
) -> PackedMicroBatch:
    """Concatenate prompts and responses, pad, and label.

    A response of T tokens gives T policy rows, and a score row when it is scored and `score_token_id` is
    given. The last row of any other response, earlier prompt rows and padding have no label, nor has a row that
    predicts a token which the policy did not sample (`PackInput.sampled`) or that is appended.

    Args:
        sequences: the micro-batch's samples in order; may be empty.
        score_token_id: z_c, or None when no score is wanted.
        pad_multiple: T is a multiple of it (tensor and context parallelism need that). Padding is the last
            sequence. An empty micro-batch is one padding sequence of this length, at least 2.
        inv_temperature: 1 / `rollout.temperature`, for the policy rows.
        context_size: context-parallel ranks. Above 1 every sequence is padded to a multiple of twice as many tokens,
            of which each rank gets two chunks. This padding stands behind the sequence's own tokens and has later
            positions, so under a causal mask none of them sees it.
        share_prompts: samples of one group, next to each other, share their prompt if it has more than one token, and
            all prompts what they begin with (`common_beginning`).

    Raises:
        ValueError: an empty prompt, `pad_multiple`, `context_size` or `inv_temperature` out of range, or prompts to
            share over context ranks.
    """
    if context_size < 1:
        raise ValueError(f"context_size={context_size}: expected at least 1.")
    multiple = 1 if context_size == 1 else 2 * context_size
    if pad_multiple < 1 or pad_multiple % multiple:
        raise ValueError(
            f"pad_multiple={pad_multiple}: expected at least 1 and a multiple of {multiple} for context_size "
            f"{context_size}."
        )
    if not 0.0 < inv_temperature < np.inf:
        raise ValueError(f"inv_temperature={inv_temperature}: expected a positive, finite number.")
    prompt_lengths = np.array([len(item.prompt_ids) for item in sequences], dtype=np.int64)
    response_lengths = np.array([len(item.response_ids) for item in sequences], dtype=np.int64)
    if not prompt_lengths.all():
        index = sequences[int(np.argmin(prompt_lengths))].sample_index
        raise ValueError(
            f"sample {index} has an empty prompt: expected at least one token before the response."
        )

    if share_prompts and context_size > 1:
        raise ValueError(f"share_prompts with context_size={context_size}: expected 1.")
    cut = _sequences(sequences, share_prompts)
    parents = np.array(cut.parents, dtype=np.int64)
    real_lengths = np.array([sum(len(ids) for ids in part) for part in cut.parts], dtype=np.int64)
    lengths = -(-real_lengths // multiple) * multiple
    total = int(lengths.sum())
    padding = -total % pad_multiple if total else max(pad_multiple, 2)
    if padding:
        lengths = np.append(lengths, padding)
        parents = np.append(parents, -1)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.full(total + padding, _PADDING_TOKEN, dtype=np.int64)
    if cut.parts:
        ids = np.concatenate([np.asarray(ids, dtype=np.int64) for part in cut.parts for ids in part])
        tokens[np.repeat(cu_seqlens[: len(cut.parts)], real_lengths) + positions_in(real_lengths)] = ids
    # Positions of a sequence behind a shared prompt go on from it.
    offsets = np.zeros(len(lengths), dtype=np.int64)
    offsets[: len(cut.offsets)] = cut.offsets
    starts = cu_seqlens[np.array(cut.place, dtype=np.int64)]

    sample_index = np.array([item.sample_index for item in sequences], dtype=np.int64)
    rows = _rows(sequences, response_lengths, score_token_id)
    row_index = (starts + np.array(cut.own_prompt, dtype=np.int64) - 1)[rows.place] + rows.offset
    is_score = rows.slot >= 0
    # The row after a score row is padding, of another sequence, or none: its token is never used as a label.
    labels = np.where(is_score, rows.label, tokens[np.minimum(row_index + 1, len(tokens) - 1)])
    packed = PackedMicroBatch(
        tokens=tokens,
        position_ids=positions_in(lengths) + np.repeat(offsets, lengths),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int((lengths + offsets).max()),
        row_index=row_index,
        labels=labels,
        is_score=is_score,
        slot=rows.slot,
        sample_index=sample_index[rows.place],
        response_position=rows.offset,
        inv_temperature=np.where(is_score, 1.0, inv_temperature).astype(np.float32),
        parents=parents if (parents >= 0).any() else None,
    )
    return _only_sampled(packed, sequences)


def _only_sampled(packed: PackedMicroBatch, sequences: Sequence[PackInput]) -> PackedMicroBatch:
    """Without the policy rows of tokens that the policy did not sample; score rows stay."""
    if all(item.sampled is None for item in sequences):
        return packed
    keep = np.ones(len(packed.row_index), dtype=np.bool_)
    for item in sequences:
        if item.sampled is not None:
            rows = np.flatnonzero((packed.sample_index == item.sample_index) & ~packed.is_score)
            keep[rows] = item.sampled[packed.response_position[rows]]
    by_row = (
        "row_index",
        "labels",
        "is_score",
        "slot",
        "sample_index",
        "response_position",
        "inv_temperature",
    )
    return replace(packed, **{name: getattr(packed, name)[keep] for name in by_row})


class _Rows(NamedTuple):
    """The labelled rows of all samples in packed order, each [R] int64.

    place: the sample, as `pack` was given it. offset: tokens of the response before the row's label. label, slot: of
    rows that predict a token 0 and -1.
    """

    place: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]


def _rows(
    sequences: Sequence[PackInput], response_lengths: npt.NDArray[np.int64], score_token_id: int | None
) -> _Rows:
    marks = [_marks(item, score_token_id) for item in sequences]
    samples = np.arange(len(sequences), dtype=np.int64)
    predicting, none = int(response_lengths.sum()), np.zeros(0, dtype=np.int64)
    counts = np.array([len(item.offset) for item in marks], dtype=np.int64)
    rows = _Rows(
        np.concatenate((np.repeat(samples, response_lengths), np.repeat(samples, counts))),
        np.concatenate((positions_in(response_lengths), *(item.offset for item in marks))),
        np.concatenate((np.zeros(predicting, np.int64), none, *(item.label for item in marks))),
        np.concatenate((np.full(predicting, -1, np.int64), none, *(item.slot for item in marks))),
    )
    order = np.lexsort((rows.slot, rows.offset, rows.place))  # by the last key first
    return _Rows(*(values[order] for values in rows))


def _marks(item: PackInput, score_token_id: int | None) -> Marks:
    if item.marks is not None:
        return item.marks
    length = len(item.response_ids)
    ends = np.array([length] if score_token_id is not None and item.scored and length else [], dtype=np.int64)
    token = np.full_like(ends, 0 if score_token_id is None else score_token_id)
    return Marks(ends, token, np.full_like(ends, item.sample_index))


_Ids = npt.NDArray[np.integer] | Sequence[int]


@dataclass(slots=True)
class _Sequences:
    """The packed sequences without padding: ids in parts, parents, and the tokens that all their ancestors have.

    place, own_prompt: of each sample its sequence, and how many tokens of its prompt stand in that.
    """

    parts: list[tuple[_Ids, ...]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    own_prompt: list[int] = field(default_factory=list)

    def add(self, parent: int, *ids: _Ids) -> int:
        """A further sequence behind `parent`; returns its index."""
        self.parts.append(ids)
        self.parents.append(parent)
        above = 0 if parent < 0 else self.offsets[parent] + sum(map(len, self.parts[parent]))
        self.offsets.append(above)
        return len(self.parts) - 1


def _sequences(samples: Sequence[PackInput], share_prompts: bool) -> _Sequences:
    def run_of(index: int) -> tuple[int | None, int]:
        group = samples[index].group if share_prompts else None
        return group, index if group is None else -1

    result = _Sequences()
    runs = [list(run) for _, run in groupby(range(len(samples)), key=run_of)]
    common = common_beginning([samples[run[0]].prompt_ids for run in runs]) if share_prompts else 0
    root = result.add(-1, samples[0].prompt_ids[:common]) if common else -1
    for run in runs:
        start, parent = common, root
        prompt = samples[run[0]].prompt_ids
        if len(run) > 1 and start < len(prompt) - 1:
            parent = result.add(parent, prompt[start:-1])
            start = len(prompt) - 1
        for index in run:
            own = samples[index].prompt_ids[start:]
            result.own_prompt.append(len(own))
            behind = (samples[index].appended,) if len(samples[index].appended) else ()
            result.place.append(result.add(parent, own, samples[index].response_ids, *behind))
    return result


def positions_in(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 .. length - 1 for each of the lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - lengths, lengths)

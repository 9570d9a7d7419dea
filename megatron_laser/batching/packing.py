"""One micro-batch of samples as one packed sequence, with its labelled rows.

This is the only place where labels are shifted. Row t predicts token t + 1: the last prompt row is labelled
y_1, rows y_1 .. y_{T-1} are labelled y_2 .. y_T, and the EOS row of a scored response is labelled with the
score token z_c, at temperature 1 (LaSeR, arXiv 2510.14943: the score is log pi(z_c | x, y, EOS)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PADDING_TOKEN = 0  # any id: padding is a sequence of its own, or behind one, and has no label


@dataclass(frozen=True, slots=True)
class PackInput:
    """One sample. Ids are int arrays (fast) or lists; `scored` as in `Sample.scored`."""

    sample_index: int
    prompt_ids: npt.NDArray[np.integer] | Sequence[int]
    response_ids: npt.NDArray[np.integer] | Sequence[int]
    scored: bool


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """T tokens of n sequences (the last may be padding) and their R labelled rows, in packed order.

    tokens, position_ids: [T] int64; positions start at 0 in every sequence.
    cu_seqlens: [n + 1] int32, the first token of each sequence, then T. max_seqlen: the longest sequence. Both count
    the padding that a sequence got for context parallelism; under it, the arrays of tokens and rows may be one rank's
    share (`context.context_shard`), and these two are of the whole all the same.
    row_index: [R] int64, strictly increasing position of the labelled row in `tokens`.
    labels: [R] int64. is_score: [R] bool, True where the label is the score token.
    sample_index: [R] int64. response_position: [R] int64, t (from 0) of the row labelled with
    response_ids[t]; len(response_ids) for the score row.
    inv_temperature: [R] float32, the policy's on policy rows and 1 on score rows.
    """

    tokens: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    max_seqlen: int
    row_index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    is_score: npt.NDArray[np.bool_]
    sample_index: npt.NDArray[np.int64]
    response_position: npt.NDArray[np.int64]
    inv_temperature: npt.NDArray[np.float32]


def pack(
    sequences: list[PackInput],
    *,
    score_token_id: int | None,
    pad_multiple: int,
    inv_temperature: float,
    context_size: int = 1,
) -> PackedMicroBatch:
    """Concatenate prompts and responses, pad, and label.

    A response of T tokens gives T policy rows, and a score row when it is scored and `score_token_id` is
    given. The last row of any other response, earlier prompt rows and padding have no label.

    Args:
        sequences: the micro-batch's samples in order; may be empty.
        score_token_id: z_c, or None when no score is wanted.
        pad_multiple: T is a multiple of it (tensor and context parallelism need that). Padding is the last
            sequence. An empty micro-batch is one padding sequence of this length, at least 2.
        inv_temperature: 1 / `rollout.temperature`, for the policy rows.
        context_size: context-parallel ranks. Above 1 every sequence is padded to a multiple of twice as many tokens,
            of which each rank gets two chunks. This padding stands behind the sequence's own tokens and has later
            positions, so under a causal mask none of them sees it.

    Raises:
        ValueError: an empty prompt, or `pad_multiple`, `context_size` or `inv_temperature` out of range.
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

    real_lengths = prompt_lengths + response_lengths
    lengths = -(-real_lengths // multiple) * multiple
    total = int(lengths.sum())
    padding = -total % pad_multiple if total else max(pad_multiple, 2)
    if padding:
        lengths = np.append(lengths, padding)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    starts = cu_seqlens[: len(sequences)]
    tokens = np.full(total + padding, _PADDING_TOKEN, dtype=np.int64)
    parts = [ids for item in sequences for ids in (item.prompt_ids, item.response_ids)]
    if parts:
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        tokens[np.repeat(starts, real_lengths) + positions_in(real_lengths)] = ids

    scored = np.array([item.scored for item in sequences], dtype=np.bool_) & (response_lengths > 0)
    rows = response_lengths + (scored if score_token_id is not None else 0)
    response_position = positions_in(rows)
    row_index = np.repeat(starts + prompt_lengths - 1, rows) + response_position
    is_score = response_position == np.repeat(response_lengths, rows)
    # The row after a score row is padding, of another sequence, or none: its token is never used as a label.
    labels = tokens[np.minimum(row_index + 1, len(tokens) - 1)]
    if score_token_id is not None:
        labels[is_score] = score_token_id
    sample_index = np.array([item.sample_index for item in sequences], dtype=np.int64)
    return PackedMicroBatch(
        tokens=tokens,
        position_ids=positions_in(lengths),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(lengths.max()),
        row_index=row_index,
        labels=labels,
        is_score=is_score,
        sample_index=np.repeat(sample_index, rows),
        response_position=response_position,
        inv_temperature=np.where(is_score, 1.0, inv_temperature).astype(np.float32),
    )


def positions_in(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 .. length - 1 for each of the lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - lengths, lengths)

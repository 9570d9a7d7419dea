"""The log-ratio of whole responses, log pi(y | x) - log pi_ref(y | x): the implicit reward, which grows with length.

Sums over the tokens of a response, its end included where it wrote one, of the raw distribution (temperature 1). Both
models are loaded in this process, one after the other, and read the same ids.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_laser.algorithms.metrics import auroc, spearman
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.files import replace_file, through_links
from megatron_laser.ops import linear_logprob

_SAY_EVERY = 500  # sequences


def check_reference(model: ModelFolder, reference: ModelFolder) -> None:
    """Refuse a reference model of another vocabulary, before anything is loaded."""
    own, other = model.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if own != other:
        differing = sum(own.get(token) != number for token, number in other.items())
        raise TestTimeError(
            f"--reference {reference.path}: its tokenizer is not {model.path}'s ({differing} of {len(other)} tokens "
            "have another id there); a log-ratio is of the same tokens, so give the model that training began with"
        )


def response_logprobs(
    folder: Path,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """log pi(response | prompt) in nats of each (prompt ids, response ids), with the folder's model.

    Raises:
        TestTimeError: a sum that is not finite.
        ConfigError, ModelFolderError: as in `rollout.hf_model.load_model`.
    """
    from megatron_laser.rollout.hf_model import load_model

    model = load_model(folder, dtype, device)
    weight = model.get_output_embeddings().weight
    sums: list[float] = []
    for number, (prompt, response) in enumerate(pairs, start=1):
        if not response:
            sums.append(0.0)
            continue
        ids = torch.tensor([*prompt, *response], dtype=torch.int64, device=device)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
            rows = hidden[len(prompt) - 1 :].contiguous()
            logprobs = linear_logprob(rows, weight, ids[len(prompt) :]).logprobs
        sums.append(float(logprobs.double().sum()))
        if not math.isfinite(sums[-1]):
            raise TestTimeError(f"{folder}: response {number - 1} has log-prob {sums[-1]}: check the weights")
        if number % _SAY_EVERY == 0:
            say(f"{folder.name}: {number} of {len(pairs)} responses")
    return sums


def write_log_ratios(
    rows: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    policy: Sequence[float],
    reference: Sequence[float],
    target: Path,
) -> dict[str, float]:
    """Write the rows with `logprob`, `reference_logprob`, and `log_ratio` as their `score`, as JSON Lines.

    A response of no tokens has null for all of them.

    Returns:
        See `log_ratio_summary`.
    """
    target = through_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    ratios, lengths, labels = [], [], []
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row, (_, response), own, other in zip(rows, pairs, policy, reference, strict=True):
                ratio = own - other if response else None
                added = {
                    "logprob": own if response else None,
                    "reference_logprob": other if response else None,
                    "log_ratio": ratio,
                    "score": ratio,
                    "response_ids_length": len(response),
                }
                file.write(json.dumps({**row, **added}, ensure_ascii=False) + "\n")
                if ratio is not None:
                    ratios.append(ratio)
                    lengths.append(len(response))
                    labels.append(row.get("reward"))
        replace_file(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return log_ratio_summary(ratios, lengths, labels)


def log_ratio_summary(
    ratios: Sequence[float], lengths: Sequence[int], rewards: Sequence[Any]
) -> dict[str, float]:
    """How the log-ratio goes with length and with being right.

    Returns:
        responses, mean, std, spearman_length and pearson_length of the log-ratio, spearman_length_per_token of the
        log-ratio divided by the length; where all have a reward auroc and auroc_per_token. What is undefined is NaN.
    """
    values, tokens = np.array(ratios, dtype=np.float64), np.array(lengths, dtype=np.float64)
    per_token = values / tokens
    known = all(isinstance(reward, int | float) for reward in rewards)
    right = [float(reward > 0.5) for reward in rewards] if known else []
    return {
        "responses": len(ratios),
        "mean": float(values.mean()) if len(ratios) else math.nan,
        "std": float(values.std(ddof=1)) if len(ratios) > 1 else math.nan,
        "spearman_length": spearman(values, tokens),
        "pearson_length": _pearson(values, tokens),
        "spearman_length_per_token": spearman(per_token, tokens),
        "auroc": auroc(values, right) if known else math.nan,
        "auroc_per_token": auroc(per_token, right) if known else math.nan,
    }


def _pearson(
    first: np.ndarray[Any, np.dtype[np.float64]], second: np.ndarray[Any, np.dtype[np.float64]]
) -> float:
    if first.size < 2 or first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])

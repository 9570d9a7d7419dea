"""Whose responses an evaluation's folder holds: reused only where everything that they depend on is the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laser import rewards
from megatron_laser.config import ConfigError
from megatron_laser.data import fingerprint
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.benchmarks.settings import Benchmark
from megatron_laser.evaluation.engine_choice import EngineChoice
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.evaluation.weight_identity import files_digest, small_files_digest
from megatron_laser.files import lock_folder, plain, write_atomically
from megatron_laser.rewards.adapters import split_kind
from megatron_laser.rewards.registry import is_math_verify, locate_reward
from megatron_laser.types import Prompt

SETTINGS = "settings.json"
RESPONSES = "responses.jsonl"
RECORDS = "records.jsonl"
# These change what the responses are worth, not the responses: the records are made anew from them.
_JUDGING = (
    "ref_logprob",
    "beta",
    "targets",
    "readout",
    "prefix",
    "reward",
    "reward_rule",
    "grading",
    "answers",
)
# Named only where they are more than what folders of earlier versions know.
_OPTIONAL = ("readout", "prefix", "ended_below")
# The same model after more training, say: it is answered anew, and the old responses are set aside.
_OF_THE_MODEL = ("weights", "model_files", "prompts")


def response_settings(
    model: ModelFolder,
    benchmark: Benchmark,
    choice: EngineChoice,
    prompts: Sequence[Prompt],
    weights: str | None,
    ended_below: float | None = None,
) -> dict[str, Any]:
    """What responses and records depend on, as settings.json has it; contents by their digests.

    Args:
        weights: the identity of the weights; None: unknown, and nothing is ever equal to it.
        ended_below: the score of a prefix below which generation ended; None: it did not.
    """
    return as_json(
        {
            "model": str(model.path),
            "weights": weights or f"unknown {uuid.uuid4().hex}",
            "model_files": small_files_digest(model.path),
            "prompts": _digest([prompt.row, list(prompt.token_ids)] for prompt in prompts),
            "answers": _digest([prompt.row, prompt.answer] for prompt in prompts),
            "data": fingerprint(benchmark.path, [benchmark.prompt_key, benchmark.answer_key]),
            "engine": choice.name,
            "generation_batch": choice.generation_batch if choice.repeatable else None,
            "stop_token_ids": list(model.stop_token_ids),
            "score_token_id": model.score_token_id,
            "ref_logprob": model.ref_logprob,
            "beta": model.beta,
            "targets": list(model.targets),
            # folders of earlier versions know one token behind the end alone, and do not name it
            **({} if model.rule.is_plain or not model.rule.token_ids else {"readout": _readout(model.rule)}),
            **({} if model.prefix is None else {"prefix": model.prefix.settings()}),
            **({} if ended_below is None else {"ended_below": _ending(model, ended_below)}),
            "grading": _grading_digest(
                benchmark.reward, *benchmark.reward_rule.get("functions", {}).values()
            ),
            **{
                name: value
                for name, value in benchmark_settings(benchmark).items()
                # what the template is given is in the prompts' ids, and folders of earlier versions do not name it
                if name not in ("path", "id_key", "chat_template_arguments", "system_prompt")
            },
        }
    )


def _readout(rule: ScoreRule) -> dict[str, Any]:
    """What the score is read of, where it is more than one token behind the end."""
    return {"token_ids": list(rule.token_ids), "kind": rule.kind, "before_end": rule.before_end}


def _ending(model: ModelFolder, threshold: float) -> dict[str, Any]:
    """What responses that were ended depend on, besides."""
    return {"threshold": threshold, **({} if model.prefix is None else model.prefix.settings())}


def claim_benchmark_folder(folder: Path, settings: dict[str, Any], *, regrade: bool) -> str:
    """Make the folder this evaluation's, or refuse it; drops records that are to be made anew.

    Responses of other weights of the same model are set aside.

    Returns:
        What was done with what the folder held, in words; "" where it is simply gone on with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, told = folder / SETTINGS, ""
    saved = _saved_settings(file)
    if saved is None and any((folder / name).exists() for name in (RESPONSES, RECORDS)):
        told = (
            f"{file} is missing or damaged, so nobody knows which model answered: answering anew; the old responses "
            f"are in {set_aside(folder)}"
        )
    elif saved is not None:
        names = [*settings, *(name for name in _OPTIONAL if name in saved and name not in settings)]
        differing = [name for name in names if saved.get(name) != settings.get(name)]
        sampled = [name for name in differing if name not in _JUDGING]
        if set(sampled) - set(_OF_THE_MODEL):
            others = "; ".join(
                f"{name}: saved {saved.get(name)!r}, now {settings.get(name)!r}"
                for name in sampled
                if name not in _OF_THE_MODEL
            )
            raise TestTimeError(
                f"{folder} holds responses of another evaluation ({others}); give another --output, or the same "
                "settings"
            )
        if sampled:
            aside = set_aside(folder)
            told = f"the model is not the one that answered before: answering anew; the old responses are in {aside}"
        elif differing and not regrade:
            regrade = True
            told = f"{', '.join(differing)} changed: judging the saved responses anew"
    if regrade:
        (folder / RECORDS).unlink(missing_ok=True)
    write_atomically(file, json.dumps(settings, indent=1) + "\n")
    return told


def _saved_settings(file: Path) -> dict[str, Any] | None:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return saved if isinstance(saved, dict) else None


def set_aside(folder: Path) -> Path:
    """Rename a benchmark's folder to NAME.old-N, and make an empty one in its place; returns the new name."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, target)
    folder.mkdir()
    return target


@contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """Nobody else evaluates into `output` meanwhile. Raises TestTimeError where somebody does."""
    try:
        lock = lock_folder(output, "--output", name=".lock")
    except ConfigError:
        raise TestTimeError(
            f"{output} is in use by another evaluation; wait, or give another --output"
        ) from None
    with lock:
        yield


def benchmark_settings(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark's settings as results.json has them."""
    settings = asdict(benchmark) | {"path": str(benchmark.path)}
    if not benchmark.reward_rule:  # folders of earlier versions do not name it
        del settings["reward_rule"]
    return settings


def as_json(value: Any) -> Any:
    """Nested dictionaries as JSON can hold them."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return plain(value)


def _digest(entries: Iterable[Any]) -> str:
    """Of what was made of the data file: ids by template, tokenizer and libraries, references by extraction."""
    total = hashlib.sha256()
    for entry in entries:
        total.update(json.dumps(entry).encode())
    return f"sha256:{total.hexdigest()}"


def _grading_digest(*functions: str) -> str:
    """Of the rules by which responses are judged: an edited reward file, or a newer grader, gives other verdicts."""
    files = sorted(Path(rewards.__file__).parent.rglob("*.py"))
    for function in functions:
        if is_math_verify(function):
            continue
        place = split_kind(locate_reward(function))[1].rpartition(":")[0]
        with suppress(ImportError, ValueError):  # found, but not run: that is the graders' part
            found = None if place.endswith(".py") else importlib.util.find_spec(place)
            place = place if found is None else str(found.origin)
        files += [Path(place)] if Path(place).is_file() else []
    return f"{files_digest(files)} math-verify {importlib.metadata.version('math-verify')}"

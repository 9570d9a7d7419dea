"""What `config init` finds out of a model folder and data files; nothing is guessed that could be looked up."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_laser.config.model_folder.architecture import Architecture, read_architecture
from megatron_laser.config.model_folder.parameters import count_parameters
from megatron_laser.errors import DataError, TestTimeError

if TYPE_CHECKING:
    from megatron_laser.evaluation.model_folder import ModelFolder
    from megatron_laser.testtime.calibration_result import TokenStatistics

PROBLEMS = ("problem", "question", "prompt", "query", "instruction", "input", "messages")
ANSWERS = (
    *("answer", "final_answer", "target", "ground_truth", "expected_answer", "reference_answer", "solution"),
    "reward_model.ground_truth",  # verl's
    *("reference", "label", "output", "response"),
)
"""Columns by the names that they usually have, the likeliest first."""
SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."
MEASURABLE = 500_000_000
"""Parameters up to which c_ref is measured on a CPU."""
_LOOKED_AT = 200  # rows, for the columns
_SAMPLE = (24, 2)  # problems and responses to each, of the measurement
_SMALL = 50_000_000  # parameters, for which it costs nothing to take
_LARGER_SAMPLE = (128, 4)
_SAMPLE_TOKENS = 256
_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Columns:
    """Of a data file. others: columns that would also do for the problem or the answer."""

    prompt: str
    answer: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """The score token. constants: the `laser` section's ref_logprob and beta as measured, with `measured` saying how;
    without them `missing` says why."""

    token: str | int | None
    ref_logprob: float | None = None
    beta: float | None = None
    measured: str = ""
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a starting file is made of. longest: tokens of the longest prompt of `problems` many."""

    model: Path
    architecture: Architecture
    parameters: int
    dtype: str
    eos: tuple[int, ...]
    columns: Columns
    chat_template: bool
    suffix: str
    problems: int
    longest: int
    gpus: int
    score: Score

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt, rounded up: other splits may have somewhat longer ones."""
        room = self.architecture.max_position_embeddings
        return max(self.longest, min(math.ceil(self.longest / 16) * 16, room // 2))


def find_columns(file: Path, prompt_key: str | None, answer_key: str | None) -> Columns:
    """The columns with problem and answer: as named, else by usual names, if they hold what they should.

    Raises:
        DataError: the file cannot be read, a named column is not there, or none has a usual name.
    """
    from megatron_laser.data.readers import read_records

    rows = [record for _, record in itertools.islice(read_records(file), _LOOKED_AT)]
    if not rows:
        raise DataError(f"{file}: no rows; a data file needs at least one")
    names = list(dict.fromkeys(name for row in rows for name in row))
    prompt, more = _pick(file, rows, names, prompt_key, PROBLEMS, _is_problem, "problem", "--prompt-key")
    rest = [name for name in names if name != prompt]
    answer, others = _pick(file, rows, rest, answer_key, ANSWERS, _is_answer, "answer", "--answer-key")
    return Columns(prompt, answer, tuple(name for name in (*more, *others) if name != answer))


def look(
    model: Path,
    data: Path,
    columns: Columns,
    *,
    measure: bool,
    say: Callable[[str], None],
) -> Facts:
    """Read folder and data, choose a score token, and measure its constants where that is a matter of minutes.

    Raises:
        ConfigError, ModelFolderError, DataError, TestTimeError: something does not fit; says what to do.
    """
    from megatron_laser.cli.options import model_folder
    from megatron_laser.data import build_prompts, read_rows
    from megatron_laser.model import platform

    architecture = read_architecture(model)
    parameters = count_parameters(architecture)
    folder = model_folder(model, None, None, None, None, with_score=False)
    template = bool(getattr(folder.tokenizer, "chat_template", None))
    suffix = SUFFIX if _can_write(folder.tokenizer, SUFFIX) else ""
    rows = read_rows(data, prompt_key=columns.prompt, answer_key=columns.answer)
    prompts = build_prompts(
        rows,
        folder.tokenizer,
        prompt_suffix=suffix,
        apply_chat_template=template,
        max_prompt_tokens=folder.max_positions - 2,
        vocab_size=folder.vocab_size,
    )[0]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    gpus = platform.device_count()
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    score = _score(
        folder, data, columns, suffix, template, longest, parameters, gpus, measure=measure, say=say
    )
    return Facts(
        model=model,
        architecture=architecture,
        parameters=parameters,
        dtype=str(content.get("dtype") or content.get("torch_dtype") or "not named"),
        eos=tuple(folder.stop_token_ids),
        columns=columns,
        chat_template=template,
        suffix=suffix,
        problems=len(prompts),
        longest=longest,
        gpus=gpus,
        score=score,
    )


def calibrate_command(model: Path, data: Path, columns: Columns, suffix: str, *, template: bool) -> list[str]:
    """What measures the constants as training will see the problems."""
    return [
        *("megatron-laser", "calibrate", str(model), str(data)),
        *("--prompt-key", columns.prompt, "--answer-key", columns.answer),
        *(() if suffix == SUFFIX else ("--prompt-suffix", suffix)),
        *(() if template else ("--no-chat-template",)),
    ]


def _score(
    folder: ModelFolder,
    data: Path,
    columns: Columns,
    suffix: str,
    template: bool,
    longest: int,
    parameters: int,
    gpus: int,
    *,
    measure: bool,
    say: Callable[[str], None],
) -> Score:
    from megatron_laser.config.model_folder.spare_tokens import spare_tokens
    from megatron_laser.evaluation.engine_choice import EngineChoice
    from megatron_laser.testtime.calibration import CalibrationSettings, calibrate_model

    spare = spare_tokens(folder.path, vocab_size=folder.vocab_size, stop_token_ids=folder.stop_token_ids)
    proposed = Score((spare[0].id if spare[0].text is None else spare[0].text) if spare else None)
    if not measure:
        return Score(proposed.token, missing="--no-measure was given")
    if parameters > MEASURABLE:
        return Score(
            proposed.token,
            missing=f"{parameters / 1e9:.1f}B parameters are too many to measure it here in minutes",
        )
    problems, samples = _LARGER_SAMPLE if parameters <= _SMALL else _SAMPLE
    settings = CalibrationSettings(
        problems=problems,
        samples=samples,
        max_new_tokens=min(_SAMPLE_TOKENS, folder.max_positions - longest - 1),
        prompt_key=columns.prompt,
        answer_key=columns.answer,
        prompt_suffix=suffix,
        apply_chat_template=template,
        deadline=_SECONDS,
    )
    try:
        found = calibrate_model(folder, data, EngineChoice(max_batch_size=problems), settings, say=say)
    except TestTimeError as error:
        if not spare:
            raise
        return Score(proposed.token, missing=" ".join(str(error).split()))
    token = found.chosen
    wide = ""
    if token is None:  # one whose only fault is its spread is still the user's to take: the file says so
        usable = [one for one in found.tokens if _only_wide(one, settings.max_std)]
        token = min(usable, key=lambda one: one.std, default=None)
        wide = f"; WIDE: calibrate takes at most {settings.max_std:g}, the score starts as noise"
    if token is None:
        reasons = "; ".join(f"{one.name}: {one.refused}" for one in found.tokens)
        return Score(None, missing=f"no token will do: {reasons}")
    return Score(
        token.id if token.text is None else token.text,
        round(token.mean, 3),
        token.beta(settings.beta),
        f"mean of {found.responses} responses, standard deviation {token.std:.3f}{wide}",
    )


def _only_wide(token: TokenStatistics, max_std: float) -> bool:
    from megatron_laser.testtime.calibration_result import MAX_EOS_GAP

    gap = max(token.by_eos.values()) - min(token.by_eos.values()) if token.by_eos else math.inf
    return token.std > max_std and gap <= MAX_EOS_GAP and token.mean <= -1.0


def _pick(
    file: Path,
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    wanted: str | None,
    usual: Sequence[str],
    fits: Callable[[Any], bool],
    what: str,
    option: str,
) -> tuple[str, list[str]]:
    everything = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is not None:
        if wanted not in names and not any(_value(row, wanted) is not None for row in rows):
            raise DataError(f"{file}: no column {wanted!r}; its columns are {', '.join(everything)}")
        return wanted, []
    lower = {name.lower(): name for name in names}
    there = [lower.get(name, name) for name in usual]
    there = [name for name in there if any(_value(row, name) is not None for row in rows)]
    found = [name for name in there if all(fits(_value(row, name)) for row in rows)]
    if not found:
        unfit = ""
        if there:
            number = next(n for n, row in enumerate(rows, 1) if not fits(_value(row, there[0])))
            unfit = f" ({there[0]!r} is there, but row {number} has nothing in it that could be one)"
        raise DataError(
            f"{file}: no column looks like the {what}: none of {', '.join(usual)} is filled in every row{unfit}. "
            f"Its columns are {', '.join(everything)}; name the right one with {option} NAME"
        )
    return found[0], found[1:]


def _value(row: dict[str, Any], name: str) -> Any:
    """As `data.answer_key` finds it; None where there is none."""
    from megatron_laser.data.readers import value_at

    found = value_at(row, name)
    return None if found is None else found[0]


def _is_problem(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list) and bool(value) and all(isinstance(t, dict) and "content" in t for t in value)
    )


def _is_answer(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 1 and _is_answer(value[0])
    return value is not None and not isinstance(value, dict | bool) and bool(str(value).strip())


def _can_write(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer has tokens for it; one of a toy task has words of its own only."""
    # verbose: transformers would warn of a text that is longer than a small model's context
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return (unknown is None or unknown not in ids) and "boxed" in tokenizer.decode(ids)

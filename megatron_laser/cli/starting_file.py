"""The YAML file that `config init` writes, checked before it stands there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from megatron_laser.cli.starting_facts import SUFFIX, Facts, calibrate_command
from megatron_laser.config import load_config
from megatron_laser.config.variables import LITERAL_KEYS, escaped
from megatron_laser.config.yaml_text import one_line
from megatron_laser.errors import UserError
from megatron_laser.user_functions import split_system

_COLUMN = 42
_CPU_PROMPTS, _GPU_PROMPTS = 16, 128
_CPU_TOKENS, _GPU_TOKENS = 1024, 8192
_WARMUP = 200


class FileThere(UserError):
    """The file would be overwritten."""


def refuse_existing(file: Path) -> None:
    """Raises FileThere."""
    if file.exists() or file.is_symlink():
        raise FileThere(
            f"{file}: exists, and is not overwritten; choose another name with -o, or move it away"
        )


def write_starting_file(
    file: Path, facts: Facts, data: Path, validation: Path | None, test: Path | None, reward: str
) -> None:
    """Write it, if it can be read as a configuration.

    Raises:
        FileThere: it is there by now. ConfigError: the settings do not go together.
    """
    refuse_existing(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    trial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        trial.write_text(starting_text(file, facts, data, validation, test, reward), encoding="utf-8")
        load_config(trial)
        try:
            os.link(trial, file)  # unlike a rename, never over another file
        except FileExistsError:
            refuse_existing(file)
    finally:
        trial.unlink(missing_ok=True)


def starting_text(
    file: Path, facts: Facts, data: Path, validation: Path | None, test: Path | None, reward: str
) -> str:
    """The file's lines."""
    gpu, architecture, score = facts.gpus > 0, facts.architecture, facts.score
    room = architecture.max_position_embeddings - facts.max_prompt_tokens - 1
    prompts = min(_GPU_PROMPTS if gpu else _CPU_PROMPTS, facts.problems)
    steps = max(1, facts.problems // prompts)
    warmup = min(_WARMUP, steps // 4)
    wanted = _GPU_TOKENS if gpu else _CPU_TOKENS
    tokens = min(wanted, room)
    measured = score.ref_logprob is not None
    tied = "tied" if architecture.tied_embeddings else "untied"
    others = f"; also there: {', '.join(facts.columns.others)}" if facts.columns.others else ""
    eos = ", ".join(map(str, facts.eos))
    out = [
        f"# LaSeR on {facts.model.name}: written by `megatron-laser config init`. Paths are relative to this folder.",
        f"# All settings: docs/configuration.md. Next: megatron-laser check {shlex.quote(str(file))}",
        *_left_to_do(facts, data),
        "model:",
        _line(
            "path",
            _path(facts.model, file),
            f"{architecture.model_type}, {_size(facts.parameters)}, {tied} embeddings",
        ),
        _line("dtype", "bfloat16" if gpu else "float32", f"the files have {facts.dtype}"),
        "data:",
        _line("train", _path(data, file), f"{facts.problems} problems"),
        *([_line("validation", _path(validation, file))] if validation else []),
        *([_line("test", _path(test, file))] if test else []),
        _line("prompt_key", facts.columns.prompt, f"the problem{others}"),
        _line("answer_key", facts.columns.answer, "the reference answer"),
        _line(
            "prompt_suffix",
            facts.suffix,
            ""
            if facts.suffix == SUFFIX
            else "the tokenizer has no tokens for the usual request of \\boxed{}",
        ),
        _line(
            "apply_chat_template",
            facts.chat_template,
            "" if facts.chat_template else "the tokenizer has none",
        ),
        _line(
            "max_prompt_tokens",
            facts.max_prompt_tokens,
            f"the longest of the training problems has {facts.longest}",
        ),
        "rollout:",
        _line(
            "engine",
            "sglang" if gpu else "in_process",
            f"{facts.gpus} GPUs" if gpu else "no GPU on this machine",
        ),
        _line("prompts_per_step", prompts, "" if gpu else "the paper has 128"),
        _line("samples_per_prompt", 8, "the paper's"),
        _line(
            "max_new_tokens",
            tokens,
            f"what a context of {architecture.max_position_embeddings} leaves"
            if tokens < wanted
            else "a first choice",
        ),
        f"  # a response ends in the token ids {eos}, as the model folder has it",
        "reward:",
        _line(
            "function", _function(reward, file), "" if reward != "math_verify" else "others: docs/rewards.md"
        ),
        "laser:",
        *([] if measured else [_line("enabled", False, "until ref_logprob is measured: see the top")]),
        *(
            []
            if score.token is None
            else [
                _line(
                    "score_token",
                    score.token,
                    "in no problem and no answer" if measured else "spare, not measured",
                )
            ]
        ),
        *(
            [_line("ref_logprob", score.ref_logprob, score.measured), _line("beta", score.beta)]
            if measured
            else []
        ),
        _line(
            "reasoning_warmup_steps",
            warmup,
            "the paper's" if warmup == _WARMUP else "a quarter; the paper has 200",
        ),
        _line("self_reward_warmup_steps", warmup),
        "optimizer:",
        _line("lr", "1.0e-6", "the paper's, for 7B; small models learn with more"),
        *(["evaluation:", _line("every", max(1, steps // 10))] if validation else []),
        "run:",
        _line("steps", steps, f"once through the data: {facts.problems} / {prompts}"),
        _line("output_dir", f"runs/{file.stem}"),
    ]
    return "\n".join(out) + "\n"


def _left_to_do(facts: Facts, data: Path) -> list[str]:
    if facts.score.ref_logprob is not None:
        return []
    command = calibrate_command(facts.model, data, facts.columns, facts.suffix, template=facts.chat_template)
    return [
        f"# LEFT TO DO: laser.ref_logprob is not measured ({facts.score.missing}). As it is this file trains GRPO.",
        f"#   {shlex.join(command)}",
        "# prints score_token, ref_logprob and beta: put them into `laser` below, and take `enabled: false` out.",
    ]


def _line(key: str, value: object, comment: str = "") -> str:
    text = value if key == "lr" else one_line(value if key in LITERAL_KEYS else escaped(value))
    line = f"  {key}: {text}"
    return f"{line:<{_COLUMN}} # {comment}" if comment else line


def _size(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit} parameters"
    return f"{parameters} parameters"


def _function(name: str, file: Path) -> str:
    """`name` as the file has to say it: a Python file is looked for from the file's folder."""
    system, place = split_system(name)
    place, colon, function = place.rpartition(":")
    return f"{system}{_path(Path(place), file)}:{function}" if colon and place.endswith(".py") else name


def _path(path: Path, file: Path) -> str:
    """From the file's folder where both are near, else absolute."""
    near = os.path.relpath(path.absolute(), file.absolute().parent)
    return near if near.count("..") <= 2 else os.path.normpath(path.absolute())

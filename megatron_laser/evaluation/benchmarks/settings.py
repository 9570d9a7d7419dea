"""Benchmarks to evaluate on, as one YAML file: where the problems lie, how often and how long each is answered.

And a benchmark's problems and references, as its verifier needs them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_laser.config.schema.fields import (
    Count,
    FilePath,
    NonNegative,
    Number,
    Section,
    Seed,
    TemplateArguments,
    Text,
    TopP,
)
from megatron_laser.config.schema.inputs import RewardConfig, RewardTerms
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.config.yaml_text import syntax_problem, yaml_value
from megatron_laser.data import Row, log_warnings, read_rows, reference_findings, unusable_findings
from megatron_laser.errors import ConfigError
from megatron_laser.rewards import RewardRule, answer_form, is_math_verify, may_want_row, reward_rule

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_DEFAULT_SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."


class BenchmarkSettings(Section):
    """One benchmark. What is null comes from the file's `defaults`, else from the model's training run, else is
    the paper's."""

    path: FilePath | None = None
    """Problems: .jsonl or .parquet."""
    samples: Count | None = None
    """Responses to each problem, K of the votes."""
    max_new_tokens: Count | None = None
    """Longest response, in tokens."""
    max_prompt_tokens: Count | None = None
    """Longer prompts are left out and named."""
    max_problems: Count | None = None
    """Only the first so many problems."""
    temperature: NonNegative | None = None
    """Sampling temperature; 0 is greedy."""
    top_p: TopP | None = None
    """Nucleus sampling."""
    prompt_key: Text | None = None
    """Column with the problem."""
    answer_key: Text | None = None
    """Column with the reference answer."""
    id_key: Text | None = None
    """Column with the problem's name, where there is one."""
    prompt_suffix: str | None = None
    """Appended to each problem, before the chat template."""
    apply_chat_template: bool | None = None
    """false: the plain text is the prompt."""
    chat_template_arguments: TemplateArguments | None = None
    """Variables of the chat template, {enable_thinking: false}; {} for none."""
    system_prompt: str | None = None
    """First message of every chat; "" for none."""
    reward: Text | None = None
    """The verifier: math_verify, or as `reward.function` of a run."""
    reward_terms: RewardTerms | None = None
    """As `reward.terms` of a run; null: the run's, where the verifier is the run's."""
    reward_label: Text | None = None
    """As `reward.label`."""
    reward_threshold: Number | None = None
    """As `reward.threshold`."""
    seed: Seed | None = None
    """Of sampling, of the votes' random subsets and of the bootstrap."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark with every setting decided; the fields are those of `BenchmarkSettings`.

    reward_rule: what `reward_terms`, `reward_label` and `reward_threshold` come to: fields of a `RewardRule`; {} where
    a reward is one number.
    """

    name: str
    path: Path
    samples: int
    max_new_tokens: int
    max_prompt_tokens: int
    max_problems: int | None
    temperature: float
    top_p: float
    prompt_key: str
    answer_key: str
    id_key: str
    prompt_suffix: str
    apply_chat_template: bool
    chat_template_arguments: dict[str, Any]
    system_prompt: str
    reward: str
    seed: int
    reward_rule: dict[str, Any] = field(default_factory=dict)


_PAPER: dict[str, Any] = {
    "samples": 1,
    "max_new_tokens": 8192,
    "max_prompt_tokens": 2048,
    "temperature": 1.0,
    "top_p": 1.0,
    "prompt_key": "problem",
    "answer_key": "answer",
    "id_key": "id",
    "prompt_suffix": _DEFAULT_SUFFIX,
    "apply_chat_template": True,
    "chat_template_arguments": {},
    "system_prompt": "",
    "reward": "math_verify",
    "seed": 1234,
}

_RULE = ("terms", "label", "threshold")


def load_benchmarks(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    from_run: dict[str, Any] | None = None,
) -> list[Benchmark]:
    """Read a benchmark file, or make one benchmark of a data file.

    Args:
        path: YAML with `benchmarks: {NAME: {...}}` and, if wanted, `defaults: {...}`, whose paths start from the
            file's folder; or a .jsonl or .parquet file, which is then the one benchmark, named after it.
        overrides: "NAME.key=value" or "defaults.key=value" each; paths in them start from the working directory.
        only: names of those that are wanted; none: all.
        from_run: values that the model's training run decides (prompt_suffix, max_new_tokens, ...).

    Raises:
        ConfigError: with one line for each problem, such as a data file that is not there.
    """
    problems: list[str] = []
    if path.suffix.lower() in _DATA_SUFFIXES:
        sections: dict[str, dict[str, Any]] = {"defaults": {}, path.stem: {"path": str(path.absolute())}}
    else:
        sections = _read_sections(path, problems)
    for override in overrides:
        problems += _apply(override, sections)
    names = [name for name in sections if name != "defaults"]
    problems += [f"--only {name}: {_unknown(name, names)}" for name in only if name not in names]
    wanted = [name for name in names if not only or name in only]
    if not wanted and not problems:
        problems.append("no benchmarks; expected `benchmarks: {NAME: {path: ..., samples: ...}}`")
    defaults = _validate("defaults", sections["defaults"], problems)
    result = []
    for name in wanted:
        given = _validate(name, sections[name], problems)
        if given is None or defaults is None:
            continue
        values = _PAPER | (from_run or {})
        values |= _set(defaults) | _set(given)
        if not values["apply_chat_template"]:  # those of the training run are for its template
            values |= {"chat_template_arguments": {}, "system_prompt": ""} | _chat(defaults) | _chat(given)
        if (from_run or {}).get("reward") != values["reward"]:
            values["reward_rule"] = {}
        own = {key: values.pop(f"reward_{key}") for key in _RULE if f"reward_{key}" in values}
        if own:
            values["reward_rule"] = asdict(reward_rule(RewardConfig(**own)))
        file = values.get("path")
        if file is None:
            problems.append(f"{name}.path: required and not given; add {name}.path=FILE to the command")
        elif not file.is_file():
            problems.append(f"{name}.path: no such file: {file}; add {name}.path=FILE to the command")
        else:
            result.append(Benchmark(name=name, **{"max_problems": None} | values))
    if problems:
        raise ConfigError(problems, str(path))
    return result


def _read_sections(path: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    source = read_yaml(path)
    problems += source.problems
    sections: dict[str, dict[str, Any]] = {"defaults": source.data.get("defaults") or {}}
    for key in source.data:
        if key not in ("defaults", "benchmarks"):
            problems.append(f"{key}: unknown key; expected `defaults` and `benchmarks`")
    listed = source.data.get("benchmarks")
    if not isinstance(listed, dict) or not isinstance(sections["defaults"], dict):
        problems.append("expected `benchmarks: {NAME: {path: ..., samples: ...}}`")
        return {"defaults": {}}
    for name, values in listed.items():
        if not _NAME.fullmatch(str(name)) or name == "defaults":
            problems.append(f"{name!r}: not a benchmark's name; it becomes a folder: letters, digits, . _ -")
            continue
        sections[str(name)] = dict(values) if isinstance(values, dict) else {"path": values}
    for values in sections.values():
        if isinstance(values.get("path"), str):
            values["path"] = str(path.absolute().parent / os.path.expanduser(values["path"]))
    return sections


def _apply(override: str, sections: dict[str, dict[str, Any]]) -> list[str]:
    left, equals, text = override.partition("=")
    name, dot, key = left.strip().rpartition(".")
    if not equals or not dot:
        return [f"{override!r}: expected NAME.key=value"]
    if name not in sections:
        return [f"{override!r}: {_unknown(name, sections)}"]
    try:
        value = yaml_value(text)
    except yaml.YAMLError as error:
        return [f"{override!r}: the value is not valid YAML ({syntax_problem(error)})"]
    if key == "path" and isinstance(value, str):
        value = str(Path(os.path.expanduser(value)).absolute())
    sections[name] = {**sections[name], key: value}
    return []


def _validate(name: str, values: dict[str, Any], problems: list[str]) -> BenchmarkSettings | None:
    try:
        return BenchmarkSettings.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0]) if detail["loc"] else ""
            if detail["type"] == "extra_forbidden":
                problems.append(f"{name}.{key}: {_unknown(key, BenchmarkSettings.model_fields)}")
            else:
                message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
                problems.append(f"{name}.{key}: {message}, got {detail['input']!r}")
        return None


def _unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; expected one of {', '.join(known)}"


def _set(settings: BenchmarkSettings) -> dict[str, Any]:
    return {name: value for name, value in settings if value is not None}


def _chat(settings: BenchmarkSettings) -> dict[str, Any]:
    """What it gives itself of what needs a template."""
    return {
        name: value
        for name, value in _set(settings).items()
        if name in ("chat_template_arguments", "system_prompt")
    }


def benchmark_rule(benchmark: Benchmark) -> RewardRule:
    """How its terms and labels are made."""
    return RewardRule(**benchmark.reward_rule)


def benchmark_rows(benchmark: Benchmark, *, look: bool = False) -> list[Row]:
    """Read its file.

    Args:
        look: whether responses can equal the references; warnings are logged.

    Raises:
        DataError: the file does not fit, or (`look`) no response can equal most references.
    """
    mathematics = is_math_verify(benchmark.reward)
    rows = read_rows(
        benchmark.path,
        prompt_key=benchmark.prompt_key,
        answer_key=benchmark.answer_key,
        mathematics=mathematics,
        options_key=answer_form(benchmark.reward).options_key,
        columns=any(map(may_want_row, (benchmark.reward, *benchmark_rule(benchmark).functions.values()))),
    )
    if look and mathematics:
        log_warnings(reference_findings(rows, name=benchmark.name, ask_grader=False))
    elif look and (unusable := answer_form(benchmark.reward).unusable) is not None:
        log_warnings(unusable_findings(rows, unusable, name=benchmark.name))
    return rows

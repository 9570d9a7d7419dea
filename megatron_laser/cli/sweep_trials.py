"""What `sweep` runs: overrides to labelled runs with folders of their own, all of them checked before the first."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_laser.config import ConfigError, RunConfig, load_config
from megatron_laser.config.comparing import compare
from megatron_laser.config.yaml_text import Loader, one_line, syntax_problem, yaml_value
from megatron_laser.run.output_checks import FINISHED, OutputState, finished_steps

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._=+-]+")
_ENTRY = {"label", "overrides"}
_NAME_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep. config: as it will be read; its run.output_dir is where its metrics are."""

    label: str
    command: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.config.run.output_dir)

    @property
    def finished(self) -> bool:
        """Whether the run has made all of its steps, or has ended early by `run.early_stop` as it is now.

        With `run.epochs` all steps are as many as the rows give at most: whether a run is to start again for more,
        which it knows when it has read them, is its own to say.
        """
        from megatron_laser.data.epochs import with_most_steps

        try:
            ended = OutputState(None, *finished_steps(self.config, self.folder))
        except (OSError, ConfigError):
            return False
        return ended.is_done(with_most_steps(self.config).run.steps)

    @property
    def says_finished(self) -> bool:
        """Of a run with `run.epochs` that has just ended well: whether it has said that nothing is left to do."""
        return not self.config.run.steps_known and (self.folder / FINISHED).is_file()


def product(settings: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(label, overrides) of all combinations of "section.key=VALUE,VALUE".

    Raises:
        ConfigError: one is not of this form, or a key is given twice.
    """
    axes: list[list[tuple[str, str]]] = []
    for text in settings:
        name, equals, values = text.partition("=")
        name = name.strip()
        found = _split(values)
        if not equals or not name or not all(found):
            raise ConfigError([f"--set {text!r}: expected section.key=VALUE,VALUE"], "sweep")
        axes.append([(name, value) for value in found])
    names = [axis[0][0] for axis in axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError([f"--set {twice[0]}: given twice; put all of its values behind one"], "sweep")
    last = [name.rpartition(".")[2] for name in names]
    short = {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}
    return [
        ("_".join(f"{short[name]}={value}" for name, value in pairs), tuple(f"{n}={v}" for n, v in pairs))
        for pairs in itertools.product(*axes)
    ]


def listed(file: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(label, overrides) of a YAML file that is a list of {label?, overrides}.

    Raises:
        ConfigError: it cannot be read, or has another form.
    """
    try:
        text = file.read_text(encoding="utf-8")
        entries = yaml_value(text)
        node = yaml.compose(text, Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read: {error}"], str(file)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([f"not valid YAML: {syntax_problem(error)}"], str(file)) from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            ["expected a list of {label: NAME, overrides: [section.key=value, ...]}"], str(file)
        )
    assert node is not None  # there are entries
    lines = [item.start_mark.line + 1 for item in node.value]
    found, problems = [], []
    for index, entry in enumerate(entries):
        where = f"line {lines[index]}: "
        if not isinstance(entry, dict) or not set(entry) <= _ENTRY or "overrides" not in entry:
            problems.append(f"{where}expected {{label: NAME, overrides: [section.key=value, ...]}}")
            continue
        overrides = _overrides(entry["overrides"])
        if overrides is None:
            problems.append(
                f"{where}overrides: expected a list of section.key=value, or a table of section.key: value"
            )
            continue
        label = entry.get("label")
        ends = [text.partition("=") for text in overrides]
        made = "_".join(f"{name.rpartition('.')[2]}={value}" for name, _, value in ends) or "as_it_is"
        found.append((made if label is None else str(label), overrides))
    if problems:
        raise ConfigError(problems, str(file))
    return found


def trials(
    config: Path,
    runs: Sequence[tuple[str, tuple[str, ...]]],
    common: Sequence[str],
    output: Path | None,
    launcher: Sequence[str],
    set_files: Sequence[Path] = (),
) -> tuple[Path, list[Trial]]:
    """The sweep's folder, and its runs; each configuration is read and checked.

    Args:
        common: overrides of all runs. output: the sweep's folder; None: beside run.output_dir, with _sweep behind it.
        launcher: what starts Python: an interpreter, or torchrun with its options.
        set_files: further settings of all runs, which count less than overrides.

    Raises:
        ConfigError: all that is wrong with any of them.
    """
    folder = (output or _beside(config, runs, common, set_files)).absolute()
    found: list[Trial] = []
    problems: list[str] = []
    for label, overrides in runs:
        given = [*common, *overrides]
        name = _NOT_IN_A_NAME.sub("-", label).strip(".-")
        if not name or name in (trial.label for trial in found):
            reason = (
                f"two runs have it, or one that is the same as the name of a folder ({name}); leave one out, or "
                "give it another label in SWEEP.yaml"
            )
            problems.append(f"label {label!r}: {reason if name else 'no name of a folder'}")
            continue
        if len(name) > _NAME_LENGTH:
            problems.append(
                f"label {name[:40]!r}...: {len(name)} characters are too many for the name of a folder; give the run a "
                "short label in SWEEP.yaml"
            )
            continue
        if any(text.partition("=")[0].strip() == "run.output_dir" for text in given):
            problems.append(f"{label}: run.output_dir is the sweep's to choose; use --output for its folder")
            continue
        given.append(f"run.output_dir={one_line(str(folder / name))}")
        try:
            loaded = load_config(config, given, set_files)
        except ConfigError as error:
            problems += [f"{label}: {problem}" for problem in error.problems]
            continue
        files = [text for file in set_files for text in ("--set-file", str(file))]
        command = (*launcher, "-m", "megatron_laser", "train", str(config), *files, *given)
        trial = Trial(name, command, loaded)
        if trial.finished and (other := _changed(trial)):
            problems.append(
                f"{label}: {trial.folder} holds a finished run of other settings ({other}); choose another --output "
                "or label, or move it away"
            )
        found.append(trial)
    if problems:
        raise ConfigError(problems, str(config))
    return folder, found


def _beside(
    config: Path,
    runs: Sequence[tuple[str, tuple[str, ...]]],
    common: Sequence[str],
    set_files: Sequence[Path],
) -> Path:
    try:
        loaded = load_config(config, common, set_files)
    except ConfigError:  # perhaps complete only with what each run sets
        loaded = load_config(config, [*common, *runs[0][1]], set_files)
    folder = Path(loaded.run.output_dir)
    return folder.with_name(folder.name + "_sweep")


def shell(command: Sequence[str]) -> str:
    """To paste into a shell."""
    return shlex.join(command)


def _changed(trial: Trial) -> str:
    """What a finished run's configuration has otherwise; "" where it is the same."""
    file = trial.folder / "config.yaml"
    if not file.is_file():
        return ""
    learned = compare(load_config(file), trial.config).learned
    if not trial.config.run.steps_known:  # the run has made them into steps
        learned = [one for one in learned if one.setting not in ("run.steps", "run.epochs")]
    return "; ".join(f"{one.name} {one.a} -> {one.b}" for one in learned[:3])


def _overrides(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, dict):
        return tuple(f"{name}={one_line(item)}" for name, item in value.items())
    if isinstance(value, list) and all(isinstance(item, str) and "=" in item for item in value):
        return tuple(value)
    return None


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for one in text:
        if quote:
            quote = "" if one == quote else quote
        elif one in "\"'":
            quote = one
        elif one in "[{":
            depth += 1
        elif one in "]}":
            depth -= 1
        elif one == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += one
    return [part.strip() for part in parts]

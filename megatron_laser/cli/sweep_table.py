"""The table of a sweep, from its runs' metrics.jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.cli.sweep_trials import Trial
from megatron_laser.files import write_atomically

STATES = "states.json"
FINISHED = "finished"
COLUMNS = (
    *("run", "state", "step", "validation_last", "validation_best", "validation_best_step"),
    *("test_accuracy", "f1", "auroc", "weighted_majority", "seconds"),
)
_HEADS = (
    *("run", "state", "step", "validation, last", "validation, best", "at step"),
    *("test", "F1", "AUROC", "weighted majority", "seconds"),
)
_COUNTS = ("step", "validation_best_step", "seconds")


def read_states(folder: Path) -> dict[str, str]:
    """label -> how its last try ended; empty where none has."""
    try:
        content = json.loads((folder / STATES).read_text())
    except (OSError, ValueError):
        return {}
    return {str(label): str(state) for label, state in content.items()} if isinstance(content, dict) else {}


def rows(trials: Sequence[Trial], states: Mapping[str, str]) -> list[dict[str, Any]]:
    """One for each run, by the names of COLUMNS; None where a run has no such metric.

    Evaluations of the initial model, before the first step, do not count. F1 and AUROC of the score and the weighted
    majority are those of the test split after the last step, before that the last ones of the validation split.
    """
    return [_row(trial, states) for trial in trials]


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """As a table of Markdown, whose columns line up in a terminal, too."""
    cells = [list(_HEADS), *([_cell(name, row[name]) for name in COLUMNS] for row in table)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(COLUMNS))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in cells
    ]
    rule = "| " + " | ".join("-" * (w - (i >= 2)) + ":" * (i >= 2) for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def write_table(folder: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """sweep.md and sweep.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "sweep.md", markdown(table))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(folder / "sweep.csv", text.getvalue())


def summary(row: Mapping[str, Any]) -> str:
    """A run in one line."""
    shown = [
        f"{head} {_cell(name, row[name])}"
        for name, head in zip(COLUMNS[2:], _HEADS[2:], strict=True)
        if row[name] is not None
    ]
    return f"{row['run']}: {row['state']}" + (f" ({', '.join(shown)})" if shown else "")


def _row(trial: Trial, states: Mapping[str, str]) -> dict[str, Any]:
    lines = _read(trial.folder / "metrics.jsonl")
    test = _test(trial.folder / "evaluation")
    validation = [
        (line["step"], line["eval/accuracy"])
        for line in lines
        if line["step"] and _number(line.get("eval/accuracy"))
    ]
    best = max(validation, key=lambda pair: (pair[1], -pair[0]), default=(None, None))
    started = bool(lines) or trial.folder.is_dir()
    last = states.get(trial.label, "unfinished") if started or trial.label in states else "not started"
    finished = trial.finished or (last == FINISHED and trial.says_finished)
    if last == FINISHED:  # and its folder was taken away
        last = "unfinished" if started else "not started"
    return {
        "run": trial.label,
        "state": FINISHED if finished else last,
        "step": max((line["step"] for line in lines), default=None),
        "validation_last": validation[-1][1] if validation else None,
        "validation_best": best[1],
        "validation_best_step": best[0],
        "test_accuracy": test.get("accuracy") if _number(test.get("accuracy")) else None,
        "f1": _either(test, lines, "self_reward_f1"),
        "auroc": _either(test, lines, "self_reward_auroc"),
        "weighted_majority": _either(test, lines, "weighted_majority"),
        "seconds": sum(line["time/total"] for line in lines if _number(line.get("time/total"))) or None,
    }


def _read(file: Path) -> list[dict[str, Any]]:
    """The lines, by step. Of a line that is just being written nothing is read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and _number(content.get("step")):
            found.append(content)
    return sorted(found, key=lambda content: content["step"])


def _test(folder: Path) -> dict[str, Any]:
    """The summary of the last evaluation on the test split that is not of the initial model; empty without one."""
    found: dict[int, Path] = {}
    for file in folder.glob("test_step_*.json"):
        step = file.stem.rpartition("_")[2]
        if step.isdigit() and int(step):
            found[int(step)] = file
    try:
        content = json.loads(found[max(found)].read_text(encoding="utf-8")) if found else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _either(test: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    if test:
        return test[name] if _number(test.get(name)) else None
    values = [line[f"eval/{name}"] for line in lines if line["step"] and _number(line.get(f"eval/{name}"))]
    return values[-1] if values else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if name in _COUNTS else f"{value:.3f}"

"""The table at the top of a report: one column a run, one row a quantity."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_laser.report.plots.training import time_split
from megatron_laser.report.run_data import Evaluation, Run

Cell = Callable[[Run], str]
Number = Callable[[Run], float]


def comparison_table(runs: list[Run]) -> str:
    """Markdown. With a LaSeR and a GRPO run there is a last column, LaSeR minus GRPO."""
    pair = laser_and_grpo(runs)
    header = ["", *[_heading(run) for run in runs]]
    if pair:
        header.append("LaSeR − GRPO")
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for label, cell, number in _rows(runs):
        texts = [cell(run) for run in runs]
        if all(text == "–" for text in texts):
            continue
        if pair:
            texts.append(_difference(number, *pair))
        lines.append(_row([label, *texts]))
    return "\n".join(lines) + "\n"


def laser_and_grpo(runs: list[Run]) -> tuple[Run, Run] | None:
    """The first LaSeR run and the first GRPO run, where both are given."""
    laser = next((run for run in runs if run.kind == "LaSeR"), None)
    grpo = next((run for run in runs if run.kind == "GRPO"), None)
    return (laser, grpo) if laser and grpo else None


def final_number(name: str) -> Number:
    """A number of a run's last evaluation, NaN without one."""

    def number(run: Run) -> float:
        return run.final.number(name) if run.final else math.nan

    return number


def fixed(value: float, digits: int = 3) -> str:
    """The number with so many decimals, – for NaN."""
    # adding 0.0 turns -0.0 into 0.0
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "–"


def first_to_last(run: Run, name: str, digits: int = 3) -> str:
    """A metric's means over the first and the last tenth of the steps, – where it was not measured."""
    first, last = run.ends(name)
    return f"{fixed(first, digits)} → {fixed(last, digits)}" if math.isfinite(last) else "–"


def filled_columns(head: list[str], lines: list[list[str]]) -> str:
    """Markdown of a table whose first two columns are names, without columns that are – in every line."""
    kept = [i for i in range(len(head)) if any(cells[i] != "–" for cells in lines)]
    rule = ["---" if i < 2 else "---:" for i in kept]
    shown = [[head[i] for i in kept], rule, *([cells[i] for i in kept] for cells in lines)]
    return "\n".join(map(_row, shown)) + "\n"


def before_and_after(evaluations: list[Evaluation]) -> tuple[Evaluation, Evaluation]:
    """The first and the last evaluation of a split."""
    return evaluations[0], evaluations[-1]


def seconds_per_step(run: Run) -> float:
    """Mean of time/total, NaN without it."""
    return run.phases().get("total", math.nan)


def _rows(runs: list[Run]) -> list[tuple[str, Cell, Number | None]]:
    """(label, cell text, number for the difference or None)."""
    splits = sorted({split for run in runs for split in run.evaluations})
    rows: list[tuple[str, Cell, Number | None]] = [
        (
            "Accuracy of rollouts, first → last tenth of the steps",
            _training,
            lambda run: run.ends(run.accuracy)[1],
        )
    ]
    rows += [_split_row(split) for split in splits]
    k = max((run.final.max_k for run in runs if run.final), default=0)
    rows += [
        ("**Last evaluation**", _last_evaluation, None),
        ("Accuracy (95 % interval)", _interval("accuracy"), final_number("accuracy")),
        _plain("Self-reward F1", "self_reward_f1"),
        _plain("Self-reward accuracy on right responses", "self_reward_accuracy_correct"),
        _plain("Self-reward accuracy on wrong responses", "self_reward_accuracy_incorrect"),
        _plain("AUROC of the score", "self_reward_auroc"),
        _plain("AUROC of the mean token log-prob", "mean_logprob_auroc"),
        _plain("AUROC of the length (below 0.5: shorter is right)", "length_auroc"),
        _plain("AUROC of the score, boxed answers only", "boxed_self_reward_auroc"),
        _plain("ECE of the score (10 bins)", "self_reward_ece"),
        _plain("Brier score of the score", "self_reward_brier"),
        _plain("Spearman(score, length)", "score_length_spearman"),
    ]
    if k > 1:
        rows += [
            _plain(f"Majority of {k}", "majority"),
            _plain(f"Weighted majority of {k}", "weighted_majority"),
            ("Weighted − majority (95 % interval)", _interval("weighted_minus_majority", "+"), None),
            _plain(f"Best of {k} by score", "best_of"),
            _plain(f"At least one of {k} right", "pass"),
        ]
    return [
        *rows,
        _plain("Truncated responses", "truncated_fraction"),
        ("Responses with a score", _scored, None),
        _plain("Mean length in tokens", "response_length_mean", 1),
        ("**Run**", lambda run: "", None),
        ("Steps", lambda run: str(run.steps), None),
        ("Seconds per step", lambda run: fixed(seconds_per_step(run), 2), seconds_per_step),
        ("Time split", _time_split, None),
        ("Peak memory, GiB", _memory, None),
    ]


def _plain(label: str, name: str, digits: int = 3) -> tuple[str, Cell, Number]:
    number = final_number(name)
    return label, lambda run: fixed(number(run), digits), number


def _split_row(split: str) -> tuple[str, Cell, Number | None]:
    def cell(run: Run) -> str:
        if not run.evaluations.get(split):
            return "–"
        first, last = before_and_after(run.evaluations[split])
        text = f"{fixed(last.number('accuracy'))} (step {last.step})"
        if first is last:
            return text
        return f"{fixed(first.number('accuracy'))} (step {first.step}) → {text}"

    def number(run: Run) -> float:
        evaluations = run.evaluations.get(split)
        return evaluations[-1].number("accuracy") if evaluations else math.nan

    return f"Accuracy on {split}, before → after", cell, number


def _interval(name: str, sign: str = "") -> Cell:
    def cell(run: Run) -> str:
        value, low, high = (final_number(name + suffix)(run) for suffix in ("", "_low", "_high"))
        if not math.isfinite(value):
            return "–"
        interval = f" [{low:{sign}.3f}, {high:{sign}.3f}]" if math.isfinite(low) else ""
        return f"{value:{sign}.3f}{interval}"

    return cell


def _training(run: Run) -> str:
    return first_to_last(run, run.accuracy)


def _last_evaluation(run: Run) -> str:
    if run.final is None:
        return "–"
    problems = run.final.number("num_problems")
    count = f", {problems:.0f} problems × {run.final.max_k}" if math.isfinite(problems) else ""
    return f"{run.final.split}, step {run.final.step}{count}"


def _scored(run: Run) -> str:
    scored, responses = final_number("num_scored")(run), final_number("num_responses")(run)
    return f"{scored:.0f} of {responses:.0f}" if math.isfinite(responses) else "–"


def _time_split(run: Run) -> str:
    split = time_split(run)
    total = sum(split.values())
    parts = [f"{name} {seconds / total:.0%}" for name, seconds in split.items() if seconds >= 0.01 * total]
    return ", ".join(parts) or "–"


def _memory(run: Run) -> str:
    parts: list[str] = []
    for name, label in (("memory/peak_rss_gib", "host"), ("memory/peak_device_gib", "device")):
        _, values = run.series(name)
        if len(values):
            parts.append(f"{label} {values.max():.2f}")
    return ", ".join(parts) or "–"


def _difference(number: Number | None, laser: Run, grpo: Run) -> str:
    if number is None:
        return ""
    difference = number(laser) - number(grpo)
    return f"{difference:+.3f}" if math.isfinite(difference) else "–"


def _heading(run: Run) -> str:
    return run.label if run.kind in ("", run.label) else f"{run.label} ({run.kind})"


def _row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

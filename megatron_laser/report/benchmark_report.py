"""report.md of an evaluation on benchmarks: tables with intervals, figures, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laser.files import write_atomically

FEWEST_PROBLEMS = 20
"""Below it an interval over problems says little, and no claim is made."""
_WAYS = {
    "average": "average of single responses",
    "pass": "pass@k",
    "majority": "majority",
    "weighted_majority": "majority weighted by the score",
    "logprob_majority": "majority weighted by mean log-prob",
    "best_of": "best by the score",
    "best_by_logprob": "best by mean log-prob",
}
_DIFFERENCES = {
    "weighted_minus_majority": "weighted by the score − plain majority",
    "weighted_minus_logprob_majority": "weighted by the score − weighted by mean log-prob",
    "best_minus_average": "best by the score − average",
}
_METRICS = {
    "f1": "F1",
    "accuracy_correct": "accuracy on right responses",
    "accuracy_incorrect": "accuracy on wrong responses",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "ece": "ECE (10 bins)",
    "brier": "Brier",
}
_READING = """\
Right and wrong are the verifier's verdicts on the last box of a response. The score is r_s = beta (log pi(score token
| problem, response) − c_ref), on a scale where 1 and 0 are what right and wrong responses are trained towards; a
response is called right when it exceeds the threshold (0.5 where none is named above), and counts clamp(r_s, 0, 1) in a
weighted majority. F1 is the harmonic mean of the accuracies on right and on wrong responses. A truncated response has
no score: it has weight 0 in weighted votes and no part in the score's metrics. "Boxed" leaves out responses without an
answer. "Released" is the convention of the paper's released evaluator: all responses count, one without a box has
score 0, one that was cut off behind a box has the score that stands behind a forced end token. Mean log-prob is the
baseline that needs no training: weights e^(mean token log-prob), as in DeepConf with the sampled tokens' log-probs.
pass@k is the unbiased estimate over all subsets; average, pass@k and best-of-k are exact expectations, the majorities
are means over random subsets of each problem's responses. Intervals are 95 % bootstraps
over problems.
"""


def write_benchmark_report(
    results: Mapping[str, Any], scores: Mapping[str, Sequence[tuple[float, bool]]], output: Path
) -> Path:
    """Write report.md and plots/*.png.

    Args:
        results: what results.json holds; see `evaluation.benchmarks.run.evaluate_benchmarks`.
        scores: benchmark -> (score, right) of its scored responses.
        output: the folder.

    Returns:
        The report's path.
    """
    sections = ["# Evaluation\n", _setting(results), overview(results)]
    for name, detail in results["benchmarks"].items():
        sections += [f"## {name}\n", _facts(detail), *_figures(name, detail, scores[name], output)]
        sections += [
            "### Choosing among k responses\n",
            _caveats(detail),
            _curves(detail),
            _differences(detail),
        ]
        if detail["summary"]["num_scored"]:
            sections += ["### The score against the verifier\n", _verification(detail)]
        if detail["by_length"]:
            sections += ["### By length\n", _by_length(detail)]
        if "prefix" in detail:
            from megatron_laser.report.prefix_report import prefix_section

            sections += prefix_section(name, detail, output)
    sections += ["## How to read this\n", _READING]
    path = output / "report.md"
    write_atomically(path, "\n".join(sections))
    return path


def _setting(results: Mapping[str, Any]) -> str:
    if "judged" in results:  # scores that somebody gave: see `testtime.score_report`
        return f"{results['judged']}\n"
    score = "no score token: no scores"
    if results["score_token_id"] is not None:
        reference = results["ref_logprob"]
        score = f"score token {results['score_token_id']}, beta {results['beta']:g}, ref_logprob " + (
            "not given: no scores" if reference is None else f"{reference:g}"
        )
    weights = "" if results["weights"] is None else f" (weights {results['weights']})"
    return f"Model `{results['model']}`{weights}; engine: {results['engine']}; {score}.\n"


def overview(results: Mapping[str, Any]) -> str:
    """The first table: a line for each benchmark."""
    lines = [
        "| benchmark | problems × K | average | pass@K | majority@K | by log-prob@K | weighted@K | best@K | F1 "
        "| F1 (released) | AUROC | truncated |",
        "|---|" + "---:|" * 11,
    ]
    for name, detail in results["benchmarks"].items():
        summary = detail["summary"]
        count = f"{summary['num_problems']:.0f} × {summary['samples_per_prompt']:.0f}"
        interval = (
            f"{_number(summary['accuracy'])} {_interval(summary['accuracy_low'], summary['accuracy_high'])}"
        )
        keys = (
            *("pass", "majority", "logprob_majority", "weighted_majority", "best_of"),
            *("self_reward_f1", "released_self_reward_f1", "self_reward_auroc", "truncated_fraction"),
        )
        cells = [count, interval, *(_number(summary.get(key)) for key in keys)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    average = results["average"]
    if len(results["benchmarks"]) > 1:
        cells = ["", _number(average.get("accuracy")), *[""] * 5]
        shown = ("self_reward_f1", "released_self_reward_f1", "self_reward_auroc")
        cells += [*(_number(average.get(name)) for name in shown), ""]
        lines.append("| **mean** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _facts(detail: Mapping[str, Any]) -> str:
    summary, settings = detail["summary"], detail["settings"]
    outcomes = ", ".join(
        f"{value:.0f} {name.removeprefix('outcome/')}"
        for name, value in summary.items()
        if name.startswith("outcome/")
    )
    sampling = ""
    if settings:
        sampling = (
            f" at temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, up to "
            f"{settings['max_new_tokens']} tokens"
        )
    length, boxed = summary["response_length_mean"], summary["boxed_fraction"]
    mean = "" if length is None or math.isnan(length) else f"mean {length:.0f}; "
    return (
        f"{summary['num_problems']:.0f} problems, {summary['num_responses']:.0f} responses{sampling} "
        f"({mean}{summary['truncated_fraction']:.1%} truncated). "
        f"Grades: {outcomes}. {summary['num_scored']:.0f} responses have a score, "
        f"{'an unknown share' if boxed is None or math.isnan(boxed) else f'{boxed:.1%}'} a boxed answer.\n"
    )


def _figures(
    name: str, detail: dict[str, Any], scores: Sequence[tuple[float, bool]], output: Path
) -> list[str]:
    from megatron_laser.report.plots import benchmarks as plots
    from megatron_laser.report.plots.style import styled

    values = np.array([score for score, _ in scores], dtype=np.float64)
    right = np.array([verdict for _, verdict in scores], dtype=np.bool_)
    folder = output / "plots"
    with styled():
        drawn = (
            plots.plot_accuracy_against_k(name, detail, folder / f"{name}_votes.png"),
            plots.plot_scores(name, values, right, detail, folder / f"{name}_scores.png"),
        )
    return [f"![{path.stem}](plots/{path.name})\n" for path in drawn if path is not None]


def _caveats(detail: Mapping[str, Any]) -> str:
    """What keeps the tables below from saying what they seem to say; "" where nothing does."""
    lines = []
    if detail["no_votes"]:
        lines.append(
            f"Votes are not available: {detail['no_votes']}. The best is chosen among all responses.\n"
        )
    problems = int(detail["summary"]["num_problems"])
    if problems < FEWEST_PROBLEMS:
        lines.append(f"Only {problems} problems: the intervals are too narrow, and differences say little.\n")
    return "\n".join(lines)


def _curves(detail: Mapping[str, Any]) -> str:
    curves = detail["curves"]
    max_k = len(curves["average"]["mean"])
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < max_k} | {max_k})
    lines = ["| | " + " | ".join(f"k = {k}" for k in ks) + " |", "|---|" + "---:|" * len(ks)]
    for way, label in _WAYS.items():
        if way in curves:
            cells = (_with_interval(curves[way], k) for k in ks)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _differences(detail: Mapping[str, Any]) -> str:
    lines = [f"| difference at k = {len(detail['curves']['average']['mean'])} | |", "|---|---:|"]
    for name, label in _DIFFERENCES.items():
        if name in detail["differences"]:
            mean, low, high = (detail["differences"][name][part][-1] for part in ("mean", "low", "high"))
            lines.append(f"| {label} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _verification(detail: Mapping[str, Any]) -> str:
    summary, verification = detail["summary"], detail["verification"]
    lines = [
        f"| | all {summary['num_scored']:.0f} scored | the {summary['num_scored_boxed']:.0f} with a boxed answer "
        f"| released: all {summary['num_responses']:.0f} |",
        "|---|---:|---:|---:|",
    ]
    for name, label in _METRICS.items():
        cells = (
            f"{_number(entry['value'])} {_interval(entry['low'], entry['high'])}" if entry else "–"
            for entry in (verification.get(kind, {}).get(name) for kind in ("all", "boxed", "released"))
        )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for name, label in (
        ("mean_logprob_auroc", "AUROC of mean log-prob"),
        ("length_auroc", "AUROC of length"),
    ):
        lines.append(f"| {label} | {_number(summary[name])} | {_number(summary['boxed_' + name])} | |")
    lines.append(f"| Spearman(score, length) | {_number(summary['score_length_spearman'])} | | |")
    return "\n".join(lines) + "\n"


def _by_length(detail: Mapping[str, Any]) -> str:
    lines = [
        "| tokens | responses | accuracy | truncated | mean score | AUROC |",
        "|---|" + "---:|" * 5,
    ]
    for group in detail["by_length"]:
        span = f"{group['shortest']}" + (
            f"–{group['longest']}" if group["longest"] != group["shortest"] else ""
        )
        keys = ("accuracy", "truncated", "score_mean", "auroc")
        cells = [span, str(group["responses"]), *(_number(group[key]) for key in keys)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_interval(curve: Mapping[str, Sequence[float]], k: int) -> str:
    mean, low, high = (curve[part][k - 1] for part in ("mean", "low", "high"))
    return f"{_number(mean)} {_interval(low, high)}"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"

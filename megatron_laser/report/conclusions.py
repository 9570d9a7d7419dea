"""What a report's numbers say, in sentences; also where they speak against the method."""

from __future__ import annotations

import math

import numpy as np

from megatron_laser.report.benchmark_report import FEWEST_PROBLEMS
from megatron_laser.report.comparison_table import (
    final_number,
    fixed,
    laser_and_grpo,
    seconds_per_step,
)
from megatron_laser.report.run_data import Evaluation, FloatArray, Run
from megatron_laser.rewards.grade import FAILED_OUTCOMES

_FEWEST_OF_CLASS = 10  # right, and wrong, responses with a score, below which no AUROCs are compared
_RESAMPLES = 300  # each sorts all scores twice


def findings(runs: list[Run]) -> list[str]:
    """Sentences in Markdown, each from numbers of the runs."""
    sentences: list[str] = []
    pair = laser_and_grpo(runs)
    if pair:
        sentences += _comparison(*pair)
    for run in runs:
        sentences += _accuracy(run)
        sentences += _endings(run)
        sentences += _grading(run)
        if run.final is None:
            sentences.append(f"{run.label} has no finished evaluation, so votes and calibration are missing.")
            continue
        sentences += _score(run, run.final)
        if run.kind != "GRPO" and math.isfinite(run.final.number("self_reward_auroc")):
            sentences += [_against_baseline(run, run.final, name) for name in ("logprob", "length")]
        sentences += _votes(run, run.final)
    return [sentence for sentence in sentences if sentence]


def _comparison(laser: Run, grpo: Run) -> list[str]:
    sentences: list[str] = []
    if laser.final and grpo.final and laser.final.split == grpo.final.split:
        sentences.append(_accuracy_difference(laser, grpo, laser.final, grpo.final))
    else:
        difference = laser.ends(laser.accuracy)[1] - grpo.ends(grpo.accuracy)[1]
        if math.isfinite(difference):
            sentences.append(
                f"Share of right rollouts over the last tenth of the steps, {laser.label} minus {grpo.label}: "
                f"{difference:+.3f} (there is no common evaluation)."
            )
    for name, label in (("self_reward_f1", "F1"), ("self_reward_auroc", "AUROC")):
        trained, untrained = final_number(name)(laser), final_number(name)(grpo)
        if math.isfinite(trained) and math.isfinite(untrained):
            sentences.append(
                f"Self-reward {label}: {trained:.3f} with {laser.label}, {untrained:.3f} with {grpo.label}, "
                "whose score is not trained."
            )
    times = seconds_per_step(laser), seconds_per_step(grpo)
    if all(map(math.isfinite, times)) and times[1] > 0:
        sentences.append(
            f"A step takes {times[0]:.2f} s with {laser.label} and {times[1]:.2f} s with {grpo.label} "
            f"({times[0] / times[1] - 1:+.1%}; lengths of responses differ too)."
        )
    if laser.steps != grpo.steps:
        sentences.append(
            f"**The runs differ in length** ({laser.label} {laser.steps} steps, {grpo.label} {grpo.steps}): "
            "compare the curves at equal steps."
        )
    return sentences


def _accuracy_difference(laser: Run, grpo: Run, after: Evaluation, other: Evaluation) -> str:
    difference = after.number("accuracy") - other.number("accuracy")
    text = f"Share of right responses on {after.split}, {laser.label} minus {grpo.label}: {difference:+.3f} ("
    first, second = after.accuracy_by_row(), other.accuracy_by_row()
    if first and first.keys() == second.keys():
        low, high = _paired_interval([first[row] - second[row] for row in first])
        return (
            f"{text}95 % interval [{low:+.3f}, {high:+.3f}] over the same problems): "
            f"{_verdict(low, high, len(first))}."
        )
    return f"{text}not the same problems)."


def _paired_interval(differences: list[float]) -> tuple[float, float]:
    from megatron_laser.algorithms.metrics import bootstrap_interval  # imports torch

    return bootstrap_interval(differences, seed=0)


def _verdict(low: float, high: float, problems: float) -> str:
    if problems < FEWEST_PROBLEMS:
        return f"too few problems ({problems:.0f}) to say"
    if low > 0:
        return "more than chance explains"
    return "less, by more than chance explains" if high < 0 else "no difference beyond chance"


def _accuracy(run: Run) -> list[str]:
    first, last = run.ends(run.accuracy)
    if not math.isfinite(last):
        return [f"{run.label} has no reward_mean in metrics.jsonl."]
    sentence = f"{run.label}: rollouts were right {first:.1%} of the time at first, {last:.1%} at the end."
    tried, right, wrong = (
        run.series(name)[1].sum()
        for name in ("prompts_tried", "groups_dropped_right", "groups_dropped_wrong")
    )
    if not right + wrong:
        return [sentence]
    dropped = (
        f"{sentence} That is over all {tried:.0f} prompts that were tried, of which {right:.0f} were dropped because "
        f"all their responses were right and {wrong:.0f} because all were wrong"
    )
    if any(name.startswith("reward/") for name in run.training_rows[-1]):
        return [f"{dropped}."]  # reward_mean is no share of right responses then
    return [
        f"{dropped}; in the batches that were trained on it was {run.ends('reward_mean')[1]:.1%} at the end."
    ]


def _endings(run: Run) -> list[str]:
    """Steps in which no response ended by itself."""
    _, scored = run.series("scored_fraction")
    without = int((scored == 0).sum())
    if not without:
        return []
    return [
        f"**{run.label}: in {without} of {len(scored)} steps no response ended by itself**, so none has a score: "
        "another token may end them than `rollout.stop_token_ids`, or `rollout.max_new_tokens` is too small."
    ]


def _grading(run: Run) -> list[str]:
    """How many responses could not be graded, while training and in the last evaluation."""
    sentences = []
    _, failed = run.series("grading_failed")
    if failed.sum() > 0:
        sentences.append(
            f"**{run.label}: {failed.sum():.0f} responses in {(failed > 0).sum()} of {len(failed)} steps could not be "
            "graded** (`outcome/timeout` and `outcome/crash`); nothing was learned from them."
        )
    made = [run.series(f"function_failed_{kind}")[1].sum() for kind in ("timeout", "error", "invalid")]
    if sum(made) > 0:
        sentences.append(
            f"**{run.label}: `rollout.function` failed on {sum(made):.0f} samples** ({made[0]:.0f} time-outs, "
            f"{made[1]:.0f} errors, {made[2]:.0f} invalid samples); nothing was learned from them."
        )
    if run.final is not None:
        counts = [run.final.number(f"outcome/{name}") for name in FAILED_OUTCOMES]
        lost = sum(count for count in counts if math.isfinite(count))
        if lost:
            sentences.append(
                f"**{run.label}: {lost:.0f} of {run.final.number('num_responses'):.0f} responses of the last "
                "evaluation could not be graded** and count as wrong."
            )
    return sentences


def _score(run: Run, evaluation: Evaluation) -> list[str]:
    scored, responses = evaluation.number("num_scored"), evaluation.number("num_responses")
    if not scored > 0:
        return [f"{run.label}: no response of the last evaluation has a score."]
    counts = (
        f"{scored:.0f} of {responses:.0f} responses have a score; the {responses - scored:.0f} others (truncated, "
        "aborted or not graded) are left out of F1, AUROC and ECE and weigh 0 in votes."
    )
    if not math.isfinite(evaluation.number("self_reward_auroc")):
        return [f"{run.label}: all scored responses are of one class: no F1 and no AUROC. {counts}"]
    right, wrong = evaluation.number("score_right_mean"), evaluation.number("score_wrong_mean")
    return [
        f"{run.label}: right responses score {fixed(right, 2)} on average and wrong ones {fixed(wrong, 2)} "
        f"(targets 1 and 0); at threshold 0.5 F1 is {fixed(evaluation.number('self_reward_f1'))}, "
        f"ECE {fixed(evaluation.number('self_reward_ece'))}. {counts}"
    ]


def _against_baseline(run: Run, evaluation: Evaluation, name: str) -> str:
    """The score against what needs no training; the length in the direction in which it separates."""
    score = evaluation.number("self_reward_auroc")
    sign, field = 1, "mean_logprob"
    if name == "logprob":
        baseline = evaluation.number("mean_logprob_auroc")
        text = f"the mean token log-prob (AUROC {fixed(baseline)})"
    else:
        raw = evaluation.number("length_auroc")
        baseline = max(raw, 1 - raw)
        direction = "longer" if raw >= 0.5 else "shorter"
        text = f"the length (AUROC {fixed(baseline)}, {direction} responses being right more often)"
        sign, field = 1 if raw >= 0.5 else -1, "response_ids_length"
    if not math.isfinite(baseline):
        return ""
    both = f"{run.label}: AUROC of the score {score:.3f}, against {text}"
    interval = _auroc_gap(evaluation, field, sign)
    if interval is None:
        return f"{both}: too few responses to say which is better."
    low, high = interval
    told = f"{score - baseline:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}] over problems"
    if low > 0:
        return (
            f"{run.label}: the score (AUROC {score:.3f}) tells right from wrong better than {text}: {told}."
        )
    if high < 0:
        return (
            f"**{run.label}: {text} tells right from wrong better than the score** (AUROC {score:.3f}; {told}), "
            "and needs no training."
        )
    return f"{both}: {told}: no difference beyond chance."


def _auroc_gap(evaluation: Evaluation, field: str, sign: int) -> tuple[float, float] | None:
    """95 % interval of the score's AUROC minus that of a record's number; None where there is too little."""
    from megatron_laser.algorithms.metrics import auroc, bootstrap_interval  # imports torch

    problems: dict[int, list[tuple[float, float, bool]]] = {}
    for record in evaluation.scored_records:
        if record[field] is not None:
            one = (record["score"], sign * record[field], record["reward"] > 0.5)
            problems.setdefault(record["row"], []).append(one)
    entries = [np.array(problem, dtype=np.float64) for problem in problems.values()]
    right = sum(float(entry[:, 2].sum()) for entry in entries)
    wrong = sum(map(len, entries)) - right
    if len(entries) < FEWEST_PROBLEMS or min(right, wrong) < _FEWEST_OF_CLASS:
        return None

    def gap(chosen: list[FloatArray]) -> float:
        table = np.concatenate(chosen)
        return auroc(table[:, 0], table[:, 2]) - auroc(table[:, 1], table[:, 2])

    return bootstrap_interval(entries, seed=0, num_resamples=_RESAMPLES, statistic=gap)


def _votes(run: Run, evaluation: Evaluation) -> list[str]:
    k, problems = evaluation.max_k, evaluation.number("num_problems")
    if k < 2:
        return []
    sentences = []
    if not math.isfinite(evaluation.number("majority")):
        sentences.append(
            f"{run.label}: votes are not available, since not every right response has an answer to compare (the "
            "content of its last \\boxed{})."
        )
    gain, low, high = (
        evaluation.number("weighted_minus_majority" + suffix) for suffix in ("", "_low", "_high")
    )
    if np.isfinite([gain, low, high]).all():
        sentences.append(
            f"{run.label}: with {k} responses the weighted vote gives "
            f"{fixed(evaluation.number('weighted_majority'))}, the plain one "
            f"{fixed(evaluation.number('majority'))}: {gain:+.3f}, 95 % interval "
            f"[{low:+.3f}, {high:+.3f}] over problems: {_verdict(low, high, problems)}."
        )
    gain, low, high = (evaluation.number("best_minus_average" + suffix) for suffix in ("", "_low", "_high"))
    best, average = evaluation.number("best_of"), evaluation.number("average")
    few = problems < FEWEST_PROBLEMS
    if np.isfinite([gain, low, high]).all() and low <= 0 and 0 < average < 1 and not few:
        told = f"({best:.3f} against {average:.3f}: {gain:+.3f} [{low:+.3f}, {high:+.3f}])"
        sentences.append(
            f"**{run.label}: picking the best of {k} by score is worse than one response** {told}."
            if high < 0
            else f"{run.label}: picking the best of {k} by score is not shown to be better than one response {told}."
        )
    return sentences

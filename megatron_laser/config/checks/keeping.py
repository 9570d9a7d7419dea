"""What the best checkpoint and an early end are judged by, exports, and epochs in place of steps."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megatron_laser.config.derived import data_sources
from megatron_laser.config.schema.root import RunConfig

_WAYS = ("average", "pass", "majority", "logprob_majority", "best_by_logprob")
_SCORED_WAYS = ("weighted_majority", "best_of")
_PLAIN = (
    *("accuracy", "accuracy_low", "accuracy_high", "num_problems", "num_responses", "samples_per_prompt"),
    *(
        "num_scored",
        "num_scored_boxed",
        "num_forced",
        "response_length_mean",
        "truncated_fraction",
        "scored_fraction",
    ),
    *(
        "boxed_fraction",
        "length_auroc",
        "mean_logprob_auroc",
        "boxed_length_auroc",
        "boxed_mean_logprob_auroc",
    ),
)
_VERIFICATION = ("f1", "accuracy", "accuracy_correct", "accuracy_incorrect", "auroc", "ece", "brier")
_SCORED = (
    *(f"{prefix}self_reward_{name}" for prefix in ("", "boxed_", "released_") for name in _VERIFICATION),
    *(
        f"{name}{end}"
        for name in ("weighted_minus_majority", "best_minus_average")
        for end in ("", "_low", "_high")
    ),
    *("score_length_spearman", "zc_logprob_mean", "zc_logprob_std", "zc_logprob_max"),
    *(f"score_{name}_{what}" for name in ("right", "wrong") for what in ("mean", "std")),
)


def evaluation_metrics(config: RunConfig) -> list[str]:
    """Names of the metrics that evaluations on `data.validation` may have, `eval/...`, those of each source at last.

    Some of them depend on the data: votes need answers that can be compared (`evaluation.summary.no_votes`).
    """
    sources = data_sources(config, "validation")
    samples = [source.samples_per_prompt or config.evaluation.samples_per_prompt for source in sources]
    if not sources:
        return []
    names = [f"eval/{name}" for name in _names(config, min(samples))]
    if len(sources) > 1:
        for source, own in zip(sources, samples, strict=True):
            names += [f"eval/source/{source.name}/{name}" for name in _names(config, own)]
    return names


def _names(config: RunConfig, samples: int) -> Iterator[str]:
    ways = _WAYS + _SCORED_WAYS if config.laser.enabled else _WAYS
    yield from _PLAIN
    if config.laser.enabled:
        yield from _SCORED
    for way in ways:
        yield way
        yield from (f"{way}_at_{k}" for k in range(1, samples + 1))


def keeping_problems(config: RunConfig) -> list[str]:
    """One line each."""
    problems = []
    for setting, metric in (
        ("checkpoint.best.metric", config.checkpoint.best.metric),
        ("run.early_stop.metric", config.run.early_stop.metric),
    ):
        if metric is not None:
            problems += _metric_problems(config, setting, metric)
    if config.checkpoint.export_keep is not None and not config.checkpoint.export_every:
        problems.append(
            f"checkpoint.export_keep: {config.checkpoint.export_keep} with checkpoint.export_every 0, which writes "
            "none; set export_every, or export_keep to null"
        )
    return problems + _epoch_problems(config)


def _metric_problems(config: RunConfig, setting: str, metric: str) -> list[str]:
    missing = [
        words
        for words, given in (
            ("data.validation", config.data.validation is not None),
            ("evaluation.every above 0", config.evaluation.every > 0),
        )
        if not given
    ]
    if missing:
        return [f"{setting}: {metric} is of evaluations, which need {' and '.join(missing)}"]
    known = evaluation_metrics(config)
    # A smoke run has fewer responses to each problem.
    if metric in known or (config.rollout.limit is not None and "_at_" in metric):
        return []
    plain = f"eval/{metric.rpartition('/')[2]}"  # of a single source the metrics have no name of a source
    close = [name for name in known if name.endswith(f"/{metric}") or name == plain][:2]
    close += difflib.get_close_matches(metric, known, n=3, cutoff=0.6)
    near = list(dict.fromkeys(close))[:3] or ["eval/accuracy"]
    return [
        f"{setting}: {metric} is no metric of this run's evaluations; did you mean "
        f"{' or '.join(f'`{name}`' for name in near)}? (metrics.md lists them)"
    ]


def _epoch_problems(config: RunConfig) -> list[str]:
    run = config.run
    if run.steps_known:
        return []
    problems = []
    if config.rollout.drop_uniform_groups:
        problems.append(
            f"run.epochs: {run.epochs:g} with rollout.drop_uniform_groups: true, where a step takes as many problems "
            "as it needs, so that nobody knows how many steps an epoch has; give run.steps"
        )
    if run.mode == "train_only" or run.fake.responses:
        what = "run.mode train_only" if run.mode == "train_only" else "run.fake.responses: true"
        problems.append(f"run.epochs: {run.epochs:g} with {what}, which reads no problems; give run.steps")
    return problems

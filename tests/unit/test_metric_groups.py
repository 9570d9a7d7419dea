"""What TensorBoard and wandb are sent: every documented metric has a group, and by default there are not too many."""

import re

from helpers.documented import EVALUATIONS, TEXT, TRAINING, names

from megatron_laser.observability.metric_groups import GROUPS, dashboard_metrics, group_table, placed
from megatron_laser.observability.metrics_logger import MetricsLogger

SOURCES, READOUTS, SAMPLES = ("gsm8k", "math", "code"), ("prefix",), 8
WAYS = ("average", "pass", "majority", "weighted_majority", "best_of", "logprob_majority", "best_by_logprob")
PARTS = {
    "source": SOURCES,
    "term": ("found", "format"),
    "readout": READOUTS,
    "k": [str(k) for k in range(1, SAMPLES + 1)],
    "way": WAYS,
    "outcome": ("correct", "wrong", "no_answer", "unparsable", "timeout", "crash"),
    "kind": ("timeout", "error", "invalid"),
    "verification": ("f1", "accuracy", "accuracy_correct", "accuracy_incorrect", "auroc", "ece", "brier"),
    "phase": ("train", "logprob", "sync", "step", "generate"),
    "quarter": "1234",
}


def spelled(name):
    """All names that a documented one stands for."""
    part = re.search(r"<(\w+)>", name)
    if part is None:
        return [name]
    return [one for value in PARTS[part[1]] for one in spelled(name.replace(part[0], value, 1))]


def keys():
    """Every key of a run with LaSeR, experts, servers, sources and a further readout, of training and evaluations."""
    training = [key for name in names(TRAINING) if "<metric>" not in name for key in spelled(name)]
    training = [
        key for key in training if not re.fullmatch(r"pass_at_[3567]|score_quantiles_.*", key)
    ]  # lists
    page = EVALUATIONS.partition("\n## Groups")[0]
    evaluation = [key for name in names(page) if "<metric>" not in name for key in spelled(name)]
    training += [f"source/{source}/{key}" for source in SOURCES for key in training if "/" not in key]
    evaluation += [f"source/{source}/{key}" for source in SOURCES for key in evaluation]
    return [*training, *(f"{split}/{key}" for split in ("eval", "test") for key in evaluation)]


def test_every_documented_metric_is_in_a_group_once():
    assert [key for key in keys() if key != "step" and not placed(key)[0]] == []
    listed = [name for group in GROUPS for name in (*group.shown, *group.more)]
    assert len(set(listed)) == len(listed)


def test_a_run_with_servers_and_sources_sends_fewer_than_80_by_default_and_all_on_request():
    line = dict.fromkeys(keys(), 1.0) | {"step": 3, "score_quantiles_right": [0.1]}
    dense = {key: value for key, value in line.items() if not re.match("expert|routing|router", key)}
    assert len(dense) > 400
    assert 50 < len(dashboard_metrics(dense, every=False)) <= 80
    assert len(dashboard_metrics(line, every=False)) <= 80
    everything = dashboard_metrics(line, every=True)
    assert len(everything) == len(line) - 2  # no two have one name; step and the list are none
    assert {name.partition("/")[0] for name in everything} == {group.name for group in GROUPS}
    short = dashboard_metrics(
        {"entropy": 1, "drift/shift": 2, "time/train": 3, "reward_std": 4, "mine": 5}, every=False
    )
    assert short == {"policy/entropy": 1, "laser/drift/shift": 2, "time/train": 3, "mine": 5}


def test_the_page_has_the_table_of_groups():
    assert TEXT.endswith("\n\n" + group_table()), "write group_table() at the end of docs/metrics.md"


def test_metrics_jsonl_keeps_the_names(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        metrics.log(1, {"entropy": 1.0, "reward_std": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "entropy": 1.0, "reward_std": 2.0}\n'

"""Which evaluation is the best, when a run ends early, what is kept; epochs made into steps; what these refuse."""

import json
import logging
import math
from itertools import combinations

import pytest
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.config.checks.keeping import evaluation_metrics
from megatron_laser.data.epochs import count_rows, steps_for, with_most_steps, with_steps
from megatron_laser.errors import DataError
from megatron_laser.evaluation.keeping import Judged, Keeping
from megatron_laser.evaluation.records import EvaluationRecord
from megatron_laser.evaluation.summary import summarize_sources
from megatron_laser.rollout.progress import pass_metrics
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.best import read_best, settle_best
from megatron_laser.types import Generation, Group, Prompt, Sample

METRIC = "eval/accuracy"


def config(folder, *overrides):
    return run_config(
        folder,
        folder / "model",
        "data.validation=v.jsonl",
        "evaluation.every=1",
        f"run.output_dir={folder}",
        *overrides,
    )


def publish(folder, *steps):
    for step in steps:
        partial = folders.partial_folder(folder / "checkpoints", step)
        partial.mkdir(parents=True, exist_ok=True)
        folders.publish(partial, {"step": step}, {})


def judge(keeping, values, first=1, folder=None):
    """[(best, stops)] of evaluations after steps first, first + 1, ...; in `folder` the best ones are saved."""
    found = []
    for step, value in enumerate(values, start=first):
        keeping.add(step, {METRIC: value})
        judged = keeping.judged()
        if judged.best and folder is not None:
            publish(folder, step)
        found.append((judged.best, bool(judged.stop)))
    return found


def test_the_best_is_the_first_of_the_largest_and_what_is_not_measured_does_not_count(tmp_path, caplog):
    keeping = Keeping(config(tmp_path, f"checkpoint.best.metric={METRIC}"), None)
    keeping.add(0, {METRIC: 0.9})
    assert keeping.judged() == Judged() and keeping.state() == {}
    with caplog.at_level(logging.WARNING):
        found = judge(keeping, [0.2, 0.4, 0.4, math.nan, 0.3], folder=tmp_path)
    assert [best for best, _ in found] == [True, True, False, False, False]
    assert keeping.state() == {"best": {"step": 2, "metric": METRIC, "mode": "max", "value": 0.4}}
    assert "after step 4 has no eval/accuracy (nan)" in caplog.text
    assert keeping.judged() == Judged()  # said once


def brute_force(values, patience, min_delta):
    """After which evaluation it ends, from 1; None: never."""
    for end in range(1, len(values) + 1):
        reference, since = values[0], 0
        for value in values[1:end]:
            since = 0 if value > reference + min_delta else since + 1
            reference = value if since == 0 else reference
        if since >= patience:
            return end
    return None


@pytest.mark.parametrize("min_delta", [0.0, 0.05])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 5])
def test_an_early_end_comes_after_patience_evaluations_wherever_the_run_was_interrupted(
    tmp_path, min_delta, cut
):
    values, patience = [0.1, 0.3, 0.33, 0.3, 0.36, 0.2, 0.36, 0.1, 0.4], 2
    settings = config(tmp_path, f"run.early_stop={{metric: {METRIC}, patience: 2, min_delta: {min_delta}}}")
    keeping = Keeping(settings, None)
    found = judge(keeping, values[:cut])
    keeping = Keeping(settings, json.loads(json.dumps(keeping.state())))  # as a checkpoint keeps it
    if not any(stops for _, stops in found):
        found += judge(keeping, values[cut:], first=cut + 1)
    end = brute_force(values, patience, min_delta)
    assert [stops for _, stops in found].index(True) + 1 == end == (4 if min_delta else 7)
    # already enough for one who goes on with less patience, and not with more
    state = Keeping(
        settings, {"early_stop": {"metric": METRIC, "mode": "max", "value": 1.0, "step": 1, "count": 2}}
    )
    assert state.judged().stop == (
        "eval/accuracy has not been better than 1 of step 1 in 2 evaluations (run.early_stop.patience 2)"
    )
    longer = config(tmp_path, f"run.early_stop={{metric: {METRIC}, patience: 3}}")
    assert Keeping(longer, state.state()).judged() == Judged()
    other = config(tmp_path, "run.early_stop={metric: eval/pass, patience: 1}")
    assert Keeping(other, state.state()).state() == {}  # another metric: it counts anew


def test_a_best_whose_save_failed_is_not_what_later_ones_are_compared_with(tmp_path, caplog):
    keeping = Keeping(config(tmp_path, f"checkpoint.best.metric={METRIC}"), None)
    assert judge(keeping, [0.5], folder=tmp_path) == [(True, False)]
    settle_best(tmp_path, tmp_path / "checkpoints", keeping.state(), 1)
    assert judge(keeping, [0.9], first=2) == [(True, False)]  # the disk is full
    with caplog.at_level(logging.WARNING):
        assert judge(keeping, [0.4], first=3) == [(False, False)]
    assert "the checkpoint of step 2, the best by eval/accuracy, is not in" in caplog.text
    assert "that of step 1 is the best now" in caplog.text and keeping.state()["best"]["step"] == 1
    assert judge(keeping, [0.7], first=4) == [(True, False)]
    folders.partial_folder(tmp_path / "checkpoints", 4).mkdir()  # it is being written in the background
    assert judge(keeping, [0.6], first=5) == [(False, False)]


def test_a_verdict_reaches_other_ranks_as_text():
    for judged in (Judged(), Judged(True, ""), Judged(True, "why"), Judged(False, "why")):
        assert Judged.from_text(judged.text) == judged
    assert Judged().text == ""


def best_state(step, value):
    return {"best": {"step": step, "metric": METRIC, "mode": "max", "value": value}}


def test_best_json_names_a_checkpoint_that_is_there_and_of_the_past(tmp_path):
    root = tmp_path / "checkpoints"
    publish(tmp_path, 2, 4)
    assert settle_best(tmp_path, root, None, 4) is None and read_best(tmp_path) is None
    assert settle_best(tmp_path, root, best_state(2, 0.5), 4) == 2
    assert read_best(tmp_path).step == 2 and (root / "best").readlink().name == "step_00000002"
    (tmp_path / "hf_best").mkdir()
    # a better one whose save failed: the old one stays, and so does what was made of it
    assert settle_best(tmp_path, root, best_state(3, 0.6), 4) == 2 and (tmp_path / "hf_best").is_dir()
    assert settle_best(tmp_path, root, best_state(4, 0.7), 4) == 4
    assert (root / "best").readlink().name == "step_00000004" and not (tmp_path / "hf_best").exists()
    # the run goes on from step 2: what came later is no part of it
    assert settle_best(tmp_path, root, best_state(2, 0.5), 2) == 2
    assert settle_best(tmp_path, root, best_state(4, 0.7), 4) == 4
    assert settle_best(tmp_path, root, {}, 2) is None
    assert not (tmp_path / "best.json").exists() and not (root / "best").is_symlink()


def test_a_best_that_was_deleted_by_hand_is_forgotten(tmp_path, caplog):
    settings = config(tmp_path, f"checkpoint.best.metric={METRIC}")
    publish(tmp_path, 4)
    assert Keeping(settings, best_state(4, 0.7)).state() == best_state(4, 0.7)
    with caplog.at_level(logging.WARNING):
        assert judge(Keeping(settings, best_state(2, 0.7)), [0.1], first=5) == [(True, False)]
    assert "the checkpoint of step 2, the best by eval/accuracy, is not in" in caplog.text


def test_retention_leaves_what_is_pinned(tmp_path):
    publish(tmp_path, 1, 2, 3, 4)
    folders.retain(tmp_path / "checkpoints", keep_last=1, keep_every=0, pinned={2})
    assert [step for step, _ in folders.published(tmp_path / "checkpoints")] == [2, 4]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint.best.metric=accuracy"], "accuracy is no metric of this run's evaluations; did you mean `eval/ac"),
        (["run.early_stop.metric=eval/acuracy"], "did you mean `eval/accuracy`"),
        (["checkpoint.best.metric=eval/pass_at_8"], "eval/pass_at_8 is no metric"),
        (["checkpoint.best.metric=eval/source/a/accuracy"], "is no metric"),
        (["checkpoint.best.metric=eval/self_reward_f1", "laser.enabled=false"], "is no metric"),
        (["checkpoint.best.metric=eval/accuracy", "evaluation.every=0"], "need evaluation.every above 0"),
        (["run.early_stop.metric=eval/accuracy", "data.validation=null"], "need data.validation"),
        (["checkpoint.export_keep=2"], "checkpoint.export_keep: 2 with checkpoint.export_every 0"),
        (["run.epochs=2"], "run.epochs: expected null beside run.steps 3; give one of the two"),
        (["run.epochs=2", "run.steps=null", "rollout.drop_uniform_groups=true"], "give run.steps"),
        (["data.train=[{path: a.jsonl, samples_per_prompt: 4}]"], "samples_per_prompt: 4 is for sources of data.valid"),
    ],
)  # fmt: skip
def test_what_a_run_will_not_have_is_refused_with_what_it_has(tmp_path, overrides, words):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, *overrides)
    assert words in str(error.value)


def test_metrics_of_the_check_are_those_of_an_evaluation(tmp_path):
    settings = config(
        tmp_path,
        "data.validation=[{path: a.jsonl, samples_per_prompt: 2}, {path: b.jsonl, samples_per_prompt: 3}]",
    )
    records = [
        EvaluationRecord(
            row=row, sample=sample, problem="", answer="1", response="", response_ids_length=3, finish_reason="stop",
            scored=True, reward=float(sample == row), outcome="correct" if sample == row else "wrong", extracted="1",
            zc_logprob=-3.0, score=0.3, mean_logprob=-0.5, answer_class=sample, source="ab"[row],
        )
        for row in range(2)
        for sample in range(2 + row)
    ]  # fmt: skip
    summary = summarize_sources(records)
    # problems count alike: one of two, one of three
    assert summary["accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2) and summary["samples_per_prompt"] == 2
    names = {f"eval/{name}" for name in summary if not name.rpartition("outcome/")[1]}
    assert set(evaluation_metrics(settings)) == names


@pytest.mark.parametrize(
    ("epochs", "problems", "a_step", "steps"),
    [(1, 8, 4, 2), (3, 10, 4, 8), (0.1, 30, 1, 3), (0.1, 30, 4, 1), (1.5, 7, 2, 6), (2, 3, 64, 1)],
)
def test_epochs_come_to_the_fewest_steps_that_take_every_problem_so_often(epochs, problems, a_step, steps):
    assert steps_for(epochs, problems, a_step) == steps
    assert steps * a_step >= epochs * problems - 1e-9 and (
        (steps - 1) * a_step < epochs * problems or steps == 1
    )


def test_the_steps_of_epochs_are_checked_like_others_once_they_are_known(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"problem": "1", "answer": "2"}\n\n' + '{"problem": "3", "answer": "4"}\n' * 11
    )
    epochs = (
        "run.steps=null",
        "run.epochs=2",
        f"data.train={tmp_path / 't.jsonl'}",
        "optimizer.schedule=cosine",
    )
    settings = config(tmp_path, *epochs, "optimizer.warmup_steps=5")
    assert not settings.run.steps_known and with_most_steps(settings).run.steps == 6
    settled = with_steps(settings, 11)
    assert (settled.run.steps, settled.run.epochs) == (6, None) and settled.run.steps_known
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps: 5 leaves nothing .* run.steps 1 "):
        with_steps(settings, 2)
    assert settings.model_dump()["run"]["steps"] is None  # what is written of it is what was given
    assert with_steps(settled, 99) is settled
    assert (
        with_steps(config(tmp_path, *epochs, "rollout.limit=2"), 1000).run.steps == 3
    )  # a smoke run stays short
    with pytest.raises(DataError, match="no such file"):
        count_rows(tmp_path / "none.jsonl")


def test_pass_at_k_of_training_is_the_mean_over_all_choices_of_k_responses():
    rewards = [[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0, 0]]
    found = pass_metrics(
        [
            Group(
                Prompt(row, "", "", [3]),
                [Sample([3], Generation([5], [-1.0], "stop", 0), "", True, float(one), "") for one in group],
            )
            for row, group in enumerate(rewards)
        ]
    )
    assert list(found) == ["pass_at_1", "pass_at_2", "pass_at_4", "pass_at_6"]
    for name, value in found.items():
        k = int(name.rpartition("_")[2])
        chances = []
        for group in rewards:
            if len(group) >= k:
                chosen = list(combinations(group, k))
                chances.append(sum(any(one) for one in chosen) / len(chosen))
        assert value == pytest.approx(sum(chances) / len(chances), abs=1e-12)
    assert pass_metrics([]) == {} and pass_metrics([Group(Prompt(0, "", "", [3]), [])]) == {}

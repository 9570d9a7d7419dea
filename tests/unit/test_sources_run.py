"""A whole run over two sources with a verifier each: shares, metrics, records, and resuming as if nothing happened."""

import json
import os
import signal

import pytest
import torch
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import after_recording, checkpoint_digests, run

from megatron_laser.config import load_config
from megatron_laser.observability.rollout_metrics import rollout_metrics
from megatron_laser.rollout.progress import Progress
from megatron_laser.run.inputs import open_cursor, read_inputs
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

REWARDS = '''
def never(response, answer):
    """Nothing is right."""
    return 0.0
'''


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """(YAML file, output folder) of a run of 4 steps over `plus` (three of four prompts) and `never`."""
    folder = tmp_path_factory.mktemp("sources")
    file = write_tiny_run(folder)
    (folder / "plus.jsonl").write_text((folder / "train.jsonl").read_text())
    (folder / "two.jsonl").write_text(
        '{"problem": "1 + 1 ?", "answer": "2"}\n{"problem": "2 + 1 ?", "answer": "3"}\n'
    )
    (folder / "never.py").write_text(REWARDS)
    text = file.read_text().replace(
        "  train: train.jsonl\n",
        "  train: [{path: plus.jsonl, weight: 3}, {path: two.jsonl, name: never, reward: never.py:never}]\n"
        "  validation: [{path: two.jsonl, name: b}, {path: plus.jsonl, name: a, reward: never.py:never}]\n",
    )
    file.write_text(text.replace("every: 2\n", "every: 2\n"))
    settings = ["evaluation.every=4", "evaluation.max_prompts=2", "logging.rollouts_every=1"]
    return file, settings, run(file, folder / "whole", *settings)


def test_metrics_are_given_of_each_source_beside_those_of_all(two_sources):
    _, _, out = two_sources
    for number, line in enumerate(metrics_without_times(out), start=1):
        assert line["source/plus/prompts_tried"] == 3 and line["source/never/prompts_tried"] == 1
        assert line["source/plus/epoch"] == 3 * number / 24 and line["source/never/epoch"] == number / 2
        assert line["epoch"] == 4 * number / 26
        assert line["source/never/reward_mean"] == 0.0
        # 12 of the 16 responses are of `plus`
        for name in (
            "reward_mean",
            "response_length_mean",
            "truncated_fraction",
            "scored_fraction",
            "accuracy_tried",
        ):
            parts = 0.75 * line[f"source/plus/{name}"] + 0.25 * line[f"source/never/{name}"]
            assert line[name] == pytest.approx(parts, abs=1e-12)
        assert line["outcome/wrong"] == line["source/plus/outcome/wrong"] + line["source/never/outcome/wrong"]


def test_dumps_and_records_name_the_source_and_each_source_has_its_verifier(two_sources):
    _, _, out = two_sources
    rows = [json.loads(line) for line in (out / "rollouts/step_1.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows if row["row"] < 24} == {"plus"}
    assert {row["source"] for row in rows if row["row"] >= 24} == {"never"}
    records = [
        json.loads(one) for one in (out / "evaluation/validation_step_4.jsonl").read_text().splitlines()
    ]
    # the first two problems of each source
    assert [(record["source"], record["row"]) for record in records] == [
        ("b", 0),
        ("b", 1),
        ("a", 2),
        ("a", 3),
    ]
    line = metrics_without_times(out)[-1]
    assert line["eval/num_problems"] == 4 and line["eval/source/a/num_problems"] == 2
    assert line["eval/source/a/accuracy"] == 0.0
    right = [record["reward"] for record in records if record["source"] == "b"]
    assert line["eval/source/b/accuracy"] == sum(right) / 2
    lengths = [record["response_ids_length"] for record in records if record["source"] == "b"]
    assert line["eval/source/b/response_length_mean"] == sum(lengths) / 2


def test_a_stopped_run_over_sources_continues_bitwise(two_sources, tmp_path, monkeypatch):
    file, settings, expected = two_sources
    with monkeypatch.context() as patch:
        after_recording(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, tmp_path / "out", *settings)
    run(file, tmp_path / "out", *settings)
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    assert checkpoint_digests(tmp_path / "out", 4) == checkpoint_digests(expected, 4)


def test_rows_are_numbered_over_all_sources_and_one_source_keeps_its_cursor(two_sources, tmp_path):
    file, settings, _ = two_sources
    inputs = read_inputs(load_config(file, [*settings, f"run.output_dir={tmp_path / 'several'}"]))
    assert [prompt.row for prompt in inputs.train] == list(range(26))
    assert [prompt.reward.rpartition("/")[2] for prompt in inputs.train] == [""] * 24 + ["never.py:never"] * 2
    inputs.folder.release()
    plain = file.parent / "plus.jsonl"
    states = []
    for number, setting in enumerate((str(plain), f"[{{path: {plain}, name: x, weight: 4}}]")):
        config = load_config(file, [f"data.train={setting}", f"run.output_dir={tmp_path / str(number)}"])
        inputs = read_inputs(config)
        inputs.folder.release()
        assert {prompt.source for prompt in inputs.train} == {""}
        states.append(open_cursor(config, inputs).state_dict())
    # the same state as ever: checkpoints from before sources go on
    assert states[0] == states[1]
    assert states[0].keys() == {"num_prompts", "seed", "shuffle", "data_fingerprint", "epoch", "offset"}


def group(row, source, rewards, length):
    prompt = Prompt(row, "", "", [5], source=source)
    samples = [
        Sample(
            [5],
            Generation([7] * length, [-1.0] * length, "stop", 0),
            "",
            True,
            reward,
            "correct" if reward else "wrong",
        )
        for reward in rewards
    ]
    return Group(prompt, samples)


def test_score_metrics_of_a_source_are_those_of_its_own_samples():
    groups = [group(0, "a", [1.0, 0.0], 3), group(1, "b", [1.0, 1.0], 5), group(2, "a", [0.0, 0.0], 4)]
    batch = RolloutBatch(1, 0, groups)
    scores = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.2, float("nan")])
    zc = scores * 10 - 23
    together = rollout_metrics(batch, zc, scores)
    of_a = rollout_metrics(
        RolloutBatch(1, 0, [group(0, "", [1.0, 0.0], 3), group(2, "", [0.0, 0.0], 4)]),
        zc[[0, 1, 4, 5]],
        scores[[0, 1, 4, 5]],
    )
    assert {k.removeprefix("source/a/"): v for k, v in together.items() if k.startswith("source/a/")} == of_a
    assert not any(name.startswith("source/") for name in of_a)  # names of runs with one source stay
    assert together["source/a/self_reward_accuracy_incorrect"] == 0.5
    assert together["source/b/self_reward_accuracy_correct"] == 0.5
    assert together["source/b/response_length_mean"] == 5.0


def test_a_source_of_which_nothing_is_graded_has_no_metrics_of_responses():
    lost = Group(Prompt(1, "", "", [5], source="b"), [], group(1, "b", [0.0], 3).samples)
    batch = RolloutBatch(1, 0, [group(0, "a", [1.0, 0.0], 3), lost])
    found = rollout_metrics(batch, torch.zeros(2), torch.zeros(2))
    assert "source/a/reward_mean" in found and not any(name.startswith("source/b/") for name in found)


def test_dropped_groups_are_counted_by_source():
    progress = Progress(1, {}, 0.0)
    progress.tried_by_source.update({"a": 2, "b": 2})
    progress.groups = [group(0, "a", [1.0, 0.0], 3)]
    progress.uniform = [
        group(1, "b", [1.0, 1.0], 3),
        group(2, "b", [0.0, 0.0], 3),
        group(3, "a", [1.0, 1.0], 3),
    ]
    assert progress.source_metrics(progress.uniform[2:]) == {
        "source/a/prompts_tried": 2,
        "source/a/groups_dropped": 0,
        "source/a/groups_dropped_right": 0,
        "source/a/groups_dropped_wrong": 0,
        "source/a/accuracy_tried": 0.75,
        "source/a/pass_at_1": 0.75,
        "source/a/pass_at_2": 1.0,
        "source/b/prompts_tried": 2,
        "source/b/groups_dropped": 2,
        "source/b/groups_dropped_right": 1,
        "source/b/groups_dropped_wrong": 1,
        "source/b/accuracy_tried": 0.5,
        "source/b/pass_at_1": 0.5,
        "source/b/pass_at_2": 0.5,
    }

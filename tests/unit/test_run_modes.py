"""`run.mode`, `run.fake` and `rollout.limit`: whole runs on one process, and what is refused before one."""

import json
import os
import signal

import numpy as np
import pytest
import yaml
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import after_recording, checkpoint_digests, run

from megatron_laser.config import ConfigError, load_config, resolved_yaml
from megatron_laser.run.batch_origin import origin_problems
from megatron_laser.run.fake_batches import FakeBatches
from megatron_laser.run.preflight.finding_log import CheckFailed
from megatron_laser.run.recorded_batches import read_batch, read_origin, recorded_steps
from megatron_laser.trainer.trainer import Trainer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(YAML file, output folder) of an ordinary run of 4 steps whose batches are kept."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"))
    return file, run(file, file.parent / "ordinary", "logging.record_batches_every=1")


def weights(folder, step):
    return {name: digest for name, digest in checkpoint_digests(folder, step).items() if name != "state"}


WITH_TOKENS = ("logging.rollouts_every=1", "logging.rollouts_tokens=true")


def train_only(recorded, *more):
    return ["run.mode=train_only", f"run.batches={recorded[1] / 'batches'}", *more]


def test_training_on_recorded_batches_is_the_run_that_made_them_bitwise(recorded, tmp_path):
    """Without data and graders, and stopped and resumed on the way."""
    file, ordinary = recorded
    settings = train_only(recorded, "data.train=nowhere.jsonl", "reward.function=nowhere.py:nothing")
    with pytest.MonkeyPatch.context() as patch:
        after_recording(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, tmp_path / "again", *settings)
    assert (tmp_path / "again" / "STOPPED").exists()
    run(file, tmp_path / "again", *settings)
    assert metrics_without_times(tmp_path / "again") == metrics_without_times(ordinary)
    assert weights(tmp_path / "again", 4) == weights(ordinary, 4)
    assert not (tmp_path / "again" / "batches").exists()


@pytest.mark.parametrize("made_up", [False, True])
def test_batches_of_experts_and_of_sets_of_tokens(tmp_path, made_up):
    """Where a response's tokens went, and what they were sampled from, goes along; made up, it is of the right kind."""
    file = write_tiny_run(
        tmp_path,
        family="qwen3-moe",
        rollout={"top_k": 4},
        moe={"routing_replay": True},
        run={"steps": 2},
        checkpoint={"every": 0},
    )
    if made_up:
        (first, second) = metrics_without_times(run(file, tmp_path / "out", "run.fake.responses=true"))
        assert first["grad_norm"] > 0 and second["logprob_diff_mean"] > 0
        return
    ordinary = run(file, tmp_path / "a", "logging.record_batches_every=1", "laser.score_source=server")
    settings = ["run.mode=train_only", f"run.batches={ordinary / 'batches'}", "laser.score_source=server"]
    again = run(file, tmp_path / "b", *settings)
    assert metrics_without_times(again) == metrics_without_times(ordinary)


def test_two_settings_are_compared_on_the_same_responses(recorded, tmp_path):
    file, ordinary = recorded
    run(file, tmp_path / "other", *train_only(recorded, "laser.enabled=false", "run.steps=2", *WITH_TOKENS))
    there, here = metrics_without_times(tmp_path / "other"), metrics_without_times(ordinary)
    for name in ("reward_mean", "response_length_mean", "epoch", "prompts_tried"):
        assert [line[name] for line in there] == [line[name] for line in here[:2]]
    assert "self_reward_f1" in here[0] and "self_reward_f1" not in there[0]
    dumped = (tmp_path / "other" / "rollouts" / "step_2.jsonl").read_text().splitlines()
    for line in map(json.loads, dumped):  # a tokenizer is read for these alone
        assert line["prompt"] and line["token_ends"][-1] == len(line["response"])


@pytest.mark.long
def test_batches_kept_now_and_then_are_the_steps_of_a_run_that_trains_on_them(recorded, tmp_path):
    file, ordinary = recorded
    out = run(file, tmp_path / "some", "logging.record_batches_every=2", "run.steps=3", "checkpoint.every=0")
    assert recorded_steps(out / "batches") == [2]
    assert read_batch(out / "batches", 2).batch == read_batch(ordinary / "batches", 2).batch
    folder = tmp_path / "of_2_and_4"
    folder.mkdir()
    for name in ("step_2.json", "step_2.npz", "step_4.json", "step_4.npz"):
        (folder / name).write_bytes((ordinary / "batches" / name).read_bytes())
    settings = ["run.mode=train_only", f"run.batches={folder}", "run.steps=2", "checkpoint.every=0"]
    run(file, tmp_path / "again", *settings)
    again, first = metrics_without_times(tmp_path / "again"), metrics_without_times(ordinary)
    assert [line["reward_mean"] for line in again] == [first[1]["reward_mean"], first[3]["reward_mean"]]


def test_rollout_only_keeps_batches_and_no_weight_changes(recorded, tmp_path, monkeypatch):
    file, ordinary = recorded
    monkeypatch.setattr(Trainer, "run_batch", lambda *_: pytest.fail("something is trained"))
    out = run(file, tmp_path / "only", "run.mode=rollout_only", "checkpoint={export_hf: true, every: 0}")
    assert recorded_steps(out / "batches") == [1, 2, 3, 4]
    assert not (out / "hf").exists()
    # The first step is before any training, so its responses are those of an ordinary run; the others are not.
    there, here = (read_batch(folder / "batches", 1).batch for folder in (out, ordinary))
    assert there == here
    assert read_batch(out / "batches", 3).batch.groups != read_batch(ordinary / "batches", 3).batch.groups
    assert {read_batch(out / "batches", step).batch.weight_version for step in (1, 2, 3, 4)} == {0}
    assert all("grad_norm" not in line and line["reward_mean"] >= 0 for line in metrics_without_times(out))


@pytest.mark.long
def test_a_rollout_only_run_goes_on_with_the_prompts_that_it_has_not_had(recorded, tmp_path, monkeypatch):
    file, _ = recorded
    settings = ["run.mode=rollout_only"]
    whole = run(file, tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        after_recording(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, tmp_path / "stopped", *settings)
    run(file, tmp_path / "stopped", *settings)
    for step in (1, 2, 3, 4):
        there, here = (read_batch(tmp_path / name / "batches", step).batch for name in ("stopped", "whole"))
        assert [group.prompt for group in there.groups] == [group.prompt for group in here.groups]
        assert [s.generation.response_ids.tolist() for s in there.samples()] == [
            s.generation.response_ids.tolist() for s in here.samples()
        ]
    assert whole.exists()


@pytest.mark.long
def test_rollouts_that_cannot_be_kept_stop_a_run_that_is_there_to_keep_them(recorded, tmp_path):
    file, _ = recorded
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "batches").write_text("a file")
    with pytest.raises(RuntimeError, match=r"the batch of step 1 cannot be written to .*batches"):
        run(file, tmp_path / "out", "run.mode=rollout_only")


@pytest.mark.parametrize(
    "override, message",
    [
        ("rollout.temperature=0.5", "made with rollout.temperature 1.0, and this run has 0.5"),
        ("rollout.prompts_per_step=2", "made with rollout.prompts_per_step 4, and this run has 2"),
        ("rollout.stop_token_ids=[5]", r"end in \[1\], and this run's in \[5\]"),
        ("laser.score_source=server", "engine's log-probs of the score token 2, and they hold none; use"),
        ("data.max_prompt_tokens=4", "prompts have up to data.max_prompt_tokens 8, and this run takes 4"),
        ("run.steps=5", "holds 4 batches for run.steps 5; set run.steps to 4"),
        ("run.batches=/nowhere", "run.batches /nowhere is not there"),
    ],
)
def test_batches_that_do_not_fit_are_refused_before_a_model_is_built(recorded, tmp_path, override, message):
    with pytest.raises(CheckFailed, match=message):
        run(recorded[0], tmp_path / "out", *train_only(recorded, override))
    assert not (tmp_path / "out").exists()


def test_a_batch_of_another_vocabulary_is_refused(recorded):
    file, ordinary = recorded
    origin = read_origin(ordinary / "batches", 1)
    assert origin_problems(load_config(file), origin, (1,), 2) == []
    (problem,) = origin_problems(load_config(file), origin | {"vocab_size": 152064}, (1,), 2)
    assert "their model has a vocabulary of 152,064" in problem


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["run.mode=train_only"], "run.mode: train_only needs run.batches"),
        (["rollout.engine=none"], "rollout.engine: none is for runs in which nothing is generated"),
        (
            ["run.mode=train_only", "run.output_dir=there", "run.batches=there/../there/batches"],
            "batches is in run.output_dir .*, where this run would write over it",
        ),
        (["run.batches=b"], "run.batches: .*/b with run.mode train, which does not read it"),
        (["run.mode=rollout_only", "run.fake.weights=true"], "responses of random weights say nothing"),
        (["run.mode=rollout_only", "run.fake.responses=true"], "made-up responses are for train"),
        (["run.fake.weights=true", "rollout.engine=sglang"], "set run.fake.responses: true as well"),
        (["run.fake.responses=true", "logging.record_batches_every=2"], "made-up responses are not kept"),
        (
            ["run.mode=rollout_only", "rollout.engine=sglang", "rollout.weight_sync=colocated"],
            "use weight_sync: distributed or disk",
        ),
    ],
)
def test_settings_that_contradict_the_mode_are_refused(recorded, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(recorded[0], overrides)


def test_a_fake_run_needs_a_config_json_alone_and_says_what_it_is(recorded, tmp_path, capsys):
    """No weights, no tokenizer, no data, no graders."""
    file, _ = recorded
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((file.parent / "config.json").read_text())
    settings = [
        f"model.path={model}",
        "data.train=nowhere.jsonl",
        "run.steps=2",
        "run.fake={weights: true, responses: true}",
        *WITH_TOKENS,
    ]
    out = run(file, tmp_path / "out", *settings, "checkpoint.every=1")
    assert "FAKE: weights and responses are made up" in capsys.readouterr().out
    assert (out / "report.md").read_text().startswith("# FAKE out")
    lines = metrics_without_times(out)
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)
    assert (out / "rollouts" / "step_2.jsonl").exists()
    with pytest.raises(ConfigError, match=r"belongs to another run: .*run\.fake"):
        run(file, out)


@pytest.mark.parametrize("asked, found, cut_off", [(5, 5.0, 0.0), (50, 8.0, 1.0)])
def test_made_up_lengths_are_those_that_were_asked_for(recorded, asked, found, cut_off):
    config = load_config(
        recorded[0], [f"run.fake={{responses: true, spread: 0, response_tokens: {asked}, prompt_tokens: 3}}"]
    )
    batch = FakeBatches(config, (1,), 2).batch(4)
    assert (
        batch.step == 4 and len(batch.groups) == 4 and {len(group.samples) for group in batch.groups} == {4}
    )
    samples = list(batch.samples())
    assert {len(sample.generation.response_ids) for sample in samples} == {found}
    assert np.mean([sample.generation.truncated for sample in samples]) == cut_off
    # Nobody may take noise for the end of a response, or for the score token.
    assert not any({1, 2} & set(sample.generation.response_ids[:-1].tolist()) for sample in samples)
    assert batch == FakeBatches(config, (1,), 2).batch(4) != FakeBatches(config, (1,), 2).batch(5)


def test_made_up_lengths_have_a_long_tail(recorded):
    sizes = ["rollout.max_new_tokens=100000", "batching.tokens_per_micro_batch=200000"]
    sizes += ["rollout.prompts_per_step=100", "rollout.samples_per_prompt=40"]
    config = load_config(
        recorded[0], ["run.fake={responses: true, spread: 0.7, response_tokens: 1000}", *sizes]
    )
    batch = FakeBatches(config, (1,), 2).batch(1)
    lengths = np.array([len(sample.generation.response_ids) for sample in batch.samples()])
    # 4000 of them: the mean's standard error is 1000 sqrt(exp(0.49) - 1) / sqrt(4000) = 12.6 tokens.
    assert abs(lengths.mean() - 1000) < 4 * 12.6
    assert 0.03 < np.mean(lengths > 2500) < 0.07  # P(z > (ln 2.5 + 0.245) / 0.7 = 1.66) = 0.048


def test_random_weights_also_generate(recorded, tmp_path):
    out = run(recorded[0], tmp_path / "out", "run.fake.weights=true", "run.steps=1", "checkpoint.every=0")
    (line,) = metrics_without_times(out)
    # Trainer and engine hold the same random weights.
    assert line["logprob_diff_max"] < 1e-4


def test_one_override_makes_a_smoke_run_that_meets_every_part_of_a_step(recorded, tmp_path):
    file, _ = recorded
    big = [
        "run.steps=500",
        "rollout.prompts_per_step=6",
        "laser.reasoning_warmup_steps=200",
        "policy.minibatches=2",
    ]
    big += ["checkpoint.every=0", "optimizer.schedule=cosine", "optimizer.warmup_steps=20", "rollout.limit=3"]
    config = load_config(file, [f"run.output_dir={tmp_path / 'out'}", *big])
    assert (config.run.steps, config.rollout.prompts_per_step) == (3, 4)  # a multiple of policy.minibatches
    assert config.run.output_dir == tmp_path / "out-smoke"
    out = run(file, tmp_path / "out", *big)
    assert out == tmp_path / "out-smoke"
    lines = metrics_without_times(out)
    assert [line["step"] for line in lines] == [1, 2, 3] and "self_reward_loss" in lines[1]


def test_what_a_mode_makes_of_the_settings_is_written_down_and_read_back_the_same(recorded, tmp_path):
    file, _ = recorded
    for overrides in (
        ["rollout.limit=1"],
        ["run.fake.responses=true"],
        train_only(recorded),
        ["run.mode=rollout_only"],
    ):
        config = load_config(file, overrides)
        (tmp_path / "config.yaml").write_text(resolved_yaml(config))
        assert load_config(tmp_path / "config.yaml") == config
        # What recorded batches tell of servers was said by the run that made them.
        assert (config.alarms.server_deaths is None) == (config.rollout.engine == "none")


def test_an_ordinary_run_has_the_settings_that_were_given(recorded):
    file, _ = recorded
    given = yaml.safe_load(file.read_text())
    config = json.loads(load_config(file).model_dump_json())
    assert config["rollout"]["engine"] == "in_process" and config["run"]["name"] == "out"
    assert all(config[s][k] == v for s in ("rollout", "laser", "optimizer") for k, v in given[s].items())

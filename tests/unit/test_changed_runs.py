"""Whole runs that are stopped and go on with other settings: bitwise the same where these say only how it runs."""

import json
import shutil

import pytest
import torch
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import checkpoint_digests

from megatron_laser.config import ConfigError, load_config
from megatron_laser.config.schema.kinds import all_settings, kind_of
from megatron_laser.loop import train
from megatron_laser.run.changes import changes_allowed, read_changes
from megatron_laser.run.own_files import foreign
from megatron_laser.trainer.checkpoint.folder import published
from megatron_laser.trainer.checkpoint.torch_dist import Reader

pytestmark = pytest.mark.slow

EVERY = "checkpoint.every=1"  # so that each step can be looked at, and begun from
SETTINGS = (EVERY, "checkpoint.keep_last=9")


def go(file, output, *overrides, change=False):
    with changes_allowed(change):
        return train(load_config(file, [f"run.output_dir={output}", *SETTINGS, *overrides]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(YAML file, output folder) of a run of 4 steps in one go, with a checkpoint of each."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"))
    return file, go(file, file.parent / "whole")


@pytest.fixture
def stopped(whole, tmp_path):
    """(YAML file, output folder) of the same run, which ended after it had saved step 2 and before it saved step 3."""
    file, folder = whole
    out = tmp_path / "stopped"
    shutil.copytree(folder, out)
    for step in (3, 4):
        shutil.rmtree(checkpoint(out, step))
    (out / "FINISHED").unlink()
    return file, out


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step_{step:08d}"


def assert_same(folder, expected):
    """As far as metrics go that both runs have."""
    found, wanted = metrics_without_times(folder), metrics_without_times(expected)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, want in zip(found, wanted, strict=True):
        assert {k: v for k, v in line.items() if k in want} == {k: v for k, v in want.items() if k in line}
        assert line["grad_norm"] > 0
    saved = [checkpoint_digests(one, 4) for one in (folder, expected)]
    for one in saved:  # by path, which may have moved
        one["state"]["run"]["reward_code"] = sorted(one["state"]["run"]["reward_code"].values())
    assert saved[0] == saved[1]


TOGETHER = {
    "model.recompute": "full",
    "model.offload_activations": "true",
    "optimizer.distributed": "true",
    "optimizer.offload": "true",
    "batching.balance": "flops",
    "checkpoint.asynchronous": "true",
    "laser.drift_every": "1",
    "laser.drift_samples": "8",
    "logging.rollouts_every": "1",
    "logging.timeline_every": "1",
    "evaluation.seed": "3",
    "alarms.window": "30",
    "reward.workers": "2",
    "reward.deadline": "9",
    "rollout.deadline": "300",
    "policy.mismatch_abort": "5.0",
    "run.deadline": "70",
}
ALONE = TOGETHER | {
    "model.recompute": "[core_attn]",
    "model.layers": "torch",
    "optimizer.overlap_grad_reduce": "true",
    "optimizer.overlap_param_gather": "true",
    "optimizer.gradient_accumulation_fusion": "off",
    "rollout.verify_sync": "true",
    "rollout.sync_bucket_mib": "1",
    "checkpoint.folder": "{0}/moved_checkpoints",
    "checkpoint.export_hf": "true",
    "checkpoint.verify": "false",
    "checkpoint.keep_every": "2",
    "logging.tensorboard": "true",
    "logging.record_batches_every": "1",
    "logging.straggler_every": "1",
    "logging.profile.steps": "[3, 3]",
    "data.validation": "{0}/train.jsonl",
    "alarms.enabled": "false",
    "laser.allow_partition_excess": "true",
    "run.start_grace": "130",
    "run.max_bad_steps": "2",
}
WITH = {
    "model.offload_activations": ["model.recompute=full"],
    "optimizer.overlap_param_gather": ["optimizer.distributed=true", "optimizer.overlap_grad_reduce=true"],
    "laser.drift_every": ["laser.drift_samples=8"],
}
"""What a setting needs beside it."""


def test_what_is_tried_here_is_free():
    assert {kind_of(setting) for setting in ALONE} == {"running"}


def test_how_a_run_runs_may_change_and_it_comes_to_the_same_bit_by_bit(stopped, whole):
    """All of it at once, and with model, data and reward function in another folder."""
    file, out = stopped
    elsewhere = out.parent / "elsewhere"
    shutil.copytree(file.parent, elsewhere, ignore=shutil.ignore_patterns("whole", "out"))
    moved = {"model.path": elsewhere, "data.train": elsewhere / "train.jsonl"}
    moved["reward.function"] = f"{elsewhere / 'lucky.py'}:lucky"
    settings = TOGETHER | moved
    go(file, out, *[f"{setting}={value}" for setting, value in settings.items()])
    assert_same(out, whole[1])
    assert {(one.step, one.key, one.kind) for one in read_changes(out)} == {
        (3, setting, "running") for setting in settings
    }
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert foreign(out) == []  # all that a run writes is known as its own
    told = [event for event in events if event["kind"] == "change"]
    assert {event["step"] for event in told} == {3} and len(told) == len(settings)


@pytest.mark.long
@pytest.mark.parametrize("setting", ALONE)
def test_each_of_them_alone(stopped, whole, setting):
    file, out = stopped
    if setting == "checkpoint.folder":
        shutil.copytree(out / "checkpoints", out.parent / "moved_checkpoints")
    value = ALONE[setting].format(file.parent if setting.startswith("data.") else out.parent)
    go(file, out, f"{setting}={value}", *WITH.get(setting, []))
    if setting == "checkpoint.folder":
        shutil.rmtree(out / "checkpoints")
        (out.parent / "moved_checkpoints").rename(out / "checkpoints")
    assert_same(out, whole[1])


TRIED_ELSEWHERE = {
    # Sums in another order, or other draws: right, and not the same bits.
    *(
        "batching.tokens_per_micro_batch",
        "batching.pad_multiple",
        "batching.share_prompts",
        "model.keep_logits_gib",
    ),
    *("model.vocab_multiple", "rollout.engine", "rollout.max_batch_size", "model.attention"),
}


@pytest.mark.long
def test_every_other_free_setting_of_a_number_or_a_switch_comes_to_the_same(stopped, whole):
    """All at once, each otherwise than by default: what needs servers or GPUs has no effect here."""
    file, out = stopped
    config = load_config(file, list(SETTINGS))
    changed = []
    for setting in all_settings():
        if kind_of(setting) != "running" or setting in {*TRIED_ELSEWHERE, *ALONE, "run.steps"}:
            continue
        value = config
        for key in setting.split("."):
            value = getattr(value, key)
        if setting.startswith(("parallel.", "checkpoint.", "model.", "logging.", "evaluation.", "run.")):
            continue
        if isinstance(value, bool):
            changed.append(f"{setting}={str(not value).lower()}")
        elif isinstance(value, int | float) and "alarms" not in setting:
            changed.append(f"{setting}={value + 1}")
    assert len(changed) > 10
    go(file, out, *changed)
    assert_same(out, whole[1])


def tensors(folder, step, *kinds):
    """{name: [tensor of each kind]} of a checkpoint, float64; kinds: "weights", "optimizer.exp_avg", ..."""
    reader = Reader(checkpoint(folder, step))
    stored = reader.tensors()
    found = {}
    for key, (shape, dtype) in stored.items():
        for kind in kinds:
            if key.startswith(f"{kind}."):
                tensor = torch.empty(shape, dtype=dtype)
                reader.read_into(key, tensor)
                found.setdefault(key.removeprefix(f"{kind}."), {})[kind] = tensor.double()
    return {name: [entry[kind] for kind in kinds] for name, entry in found.items()}


OPTIMIZER = (
    "optimizer.lr=0.003",
    "optimizer.betas=[0.8, 0.99]",
    "optimizer.eps=1.0e-3",
    "optimizer.weight_decay=0.3",
)


def test_a_changed_optimizer_is_the_one_that_takes_the_next_step(stopped, whole):
    """AdamW in float64, from the moments of step 2 and the gradient that they and those of step 3 of the unchanged run
    give: at step 3 both have the same weights, and so the same rollouts and the same gradient."""
    file, out = stopped
    with pytest.raises(ConfigError, match=r"optimizer\.lr 0\.001 there and 0\.003 here"):
        go(file, out, *OPTIMIZER, "run.steps=3")
    go(file, out, *OPTIMIZER, "run.steps=3", change=True)
    assert [line["lr"] for line in metrics_without_times(out)] == pytest.approx([0.001, 0.001, 0.003])
    kinds = ("weights", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    before, unchanged = tensors(whole[1], 2, *kinds), tensors(whole[1], 3, *kinds)
    found = tensors(out, 3, *kinds)
    assert len(found) == len(before) > 20
    moved = 0.0
    for name, (weights, mean, square) in before.items():
        gradient = (unchanged[name][1] - 0.9 * mean) / (1 - 0.9)
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        update = (mean / (1 - 0.8**3)) / ((square / (1 - 0.99**3)).sqrt() + 1e-3)
        decay = 0.0 if weights.dim() == 1 else 0.3  # norms and biases take none
        expected = weights - 0.003 * (update + decay * weights)
        # float32 moments of which a tenth is the gradient: about 1e-6 of their largest entry.
        torch.testing.assert_close(found[name][1], mean, rtol=1e-4, atol=1e-5 * float(mean.abs().max()))
        torch.testing.assert_close(found[name][0], expected, rtol=0, atol=2e-5)
        moved = max(moved, float((unchanged[name][0] - expected).abs().max()))
    assert moved > 1e-3  # what an unchanged step comes to is another update


def test_a_changed_number_of_updates_a_step_ends_the_schedule_at_the_last_one(stopped):
    """2 optimizer steps are done and 4 are left."""
    file, out = stopped
    settings = ["policy.minibatches=2", "optimizer.schedule=linear", "rollout.temperature=0.8"]
    settings += ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=6", "policy.kl_coefficient=0.1"]
    go(file, out, *settings, change=True)
    lines = metrics_without_times(out)
    assert [line["lr"] for line in lines[2:]] == pytest.approx([0.001 * (1 - 4 / 6), 0.0])
    assert [line["epoch"] for line in lines] == pytest.approx([4 / 24, 8 / 24, 10 / 24, 12 / 24])
    assert {one.key for one in read_changes(out)} == {setting.partition("=")[0] for setting in settings}
    assert [step for step, _ in published(out / "checkpoints")] == [1, 2, 3, 4]


def test_a_branch_is_the_run_it_came_from_and_goes_on_in_itself(whole, tmp_path):
    file, parent = whole
    before = {path: path.read_bytes() for path in sorted(parent.rglob("*")) if path.is_file()}
    branch = [f"run.resume={checkpoint(parent, 2)}"]
    go(file, tmp_path / "branch", *branch, "run.steps=3")
    assert [step for step, _ in published(tmp_path / "branch" / "checkpoints")] == [2, 3]
    again = [*branch, "model.recompute=full"]
    go(file, tmp_path / "branch", *again)
    assert_same(tmp_path / "branch", parent)
    assert [step for step, _ in published(tmp_path / "branch" / "checkpoints")] == [2, 3, 4]
    assert {path: path.read_bytes() for path in sorted(parent.rglob("*")) if path.is_file()} == before
    assert foreign(tmp_path / "branch") == []
    steps = [(one.step, one.key) for one in read_changes(tmp_path / "branch")]
    assert steps == [(3, "run.steps"), (4, "model.recompute"), (4, "run.steps")]


@pytest.mark.long
def test_a_run_that_goes_back_comes_to_the_same_again(whole, tmp_path, caplog):
    file, folder = whole
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    go(file, out, "run.resume=step 3")
    assert_same(out, folder)
    aside = out / "moved_aside" / "after_step_3.1"
    assert metrics_without_times(aside) == metrics_without_times(folder)
    assert checkpoint_digests(aside, 4) == checkpoint_digests(folder, 4)
    caplog.clear()
    go(file, out, "run.resume=step 3")
    assert "has finished its 4 steps: nothing to do" in caplog.text

"""Settings that are changed between two starts, branches, going back and overwriting, as folders see them."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.runs import run_config
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError
from megatron_laser.config.schema.kinds import all_settings, kind_of
from megatron_laser.run.changes import may_change, read_changes
from megatron_laser.run.folder_lines import folder_lines
from megatron_laser.run.output_folder import claim_output_folder, move_aside
from megatron_laser.trainer.checkpoint import folder as folders


@pytest.fixture
def of(tmp_path):
    """The configuration of the run in output folder `name`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"problem": "1", "answer": "2"}\n')

    def build(name, *overrides):
        data = f"data.train={tmp_path / 'train.jsonl'}"
        steps = f"run.output_dir={tmp_path / name}", "run.steps=100"
        return run_config(tmp_path, tmp_path / "model", *steps, data, *overrides)

    return build


def save(config, step, owner):
    """As much of a checkpoint as the folders see."""
    partial = folders.partial_folder(folders.checkpoint_root(config), step)
    partial.mkdir(parents=True)
    (partial / "weights").write_text(f"of step {step}")
    state = {"step": step, "run": {"cursor": 4 * step, "owner": asdict(owner)}}
    return folders.publish(partial, state, folders.digests(partial, "weights"))


def start(config, *steps, **how):
    """Claim the folder and save checkpoints of `steps` and metrics up to the last one; what was claimed."""
    held = claim_output_folder(config, **how)
    for step in steps:
        save(config, step, held.owner)
    if steps:
        with (held.path / "metrics.jsonl").open("a") as file:
            file.writelines(f'{{"step": {step}}}\n' for step in range(1, steps[-1] + 1))
    held.release()
    return held


def refused(config, **how):
    with pytest.raises(ConfigError) as error:
        claim_output_folder(config, **how)
    return str(error.value)


def record(config):
    return json.loads((config.run.output_dir / "run.json").read_text())


def everything(folder):
    """Names, bytes and times of a folder's files, and of the files that they are."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


OTHER = {
    "model.path": "{0}/other_model",
    "model.dtype": "bfloat16",
    "data.train": "{0}/other.jsonl",
    "data.prompt_key": "question",
    "data.answer_key": "solution",
    "data.prompt_suffix": "Answer.",
    "data.apply_chat_template": "false",
    "data.chat_template_arguments": "{{thinking: false}}",
    "data.system_prompt": "Think.",
    "data.max_prompt_tokens": "32",
    "data.shuffle": "false",
    "rollout.function": "{0}/talk.py:talk",
    "rollout.stop_token_ids": "[3]",
    "reward.function": "multiple_choice",
    "laser.score_token": "248",
    "laser.ref_logprob": "-5.5",
    "laser.beta": "0.5",
    "laser.targets": "[0.9, 0.1]",
    "laser.loss": "bce",
    "laser.reference": "model",
    "moe.freeze_router": "true",
    "run.mode": "rollout_only",
    "run.seed": "7",
}
NEED_OTHERS = {"rollout.limit", "rollout.function_options", "run.batches"}
"""Those that cannot be changed alone; a smoke run has another folder, too. And `run.fake`."""


def test_each_setting_that_identifies_a_run_is_tried_below():
    identities = {one for one in all_settings() if kind_of(one) == "identity"}
    alone = {one for one in identities - NEED_OTHERS if not one.startswith("run.fake.")}
    # What belongs to the reward is its own tests', beside reward.function.
    assert {one for one in alone if not one.startswith("reward.")} <= set(OTHER) <= identities


@pytest.mark.parametrize("setting", OTHER)
def test_a_changed_identity_is_refused_with_both_values_and_the_reason(of, tmp_path, setting):
    (tmp_path / "other.jsonl").write_text('{"problem": "3", "answer": "4"}\n')
    start(of("run"), 20)
    there = record(of("run"))["settings"][setting]
    other = of("run", f"{setting}={OTHER[setting].format(tmp_path)}")
    here = json.loads(other.model_dump_json())
    for key in setting.split("."):
        here = here[key]
    assert here != there
    for how in ({}, {"change": True}):
        message = refused(other, **how)
        assert (
            "belongs to another run: " in message
            and f"{setting} {there!r} there and {here!r} here" in message
        )
        assert "choose another run.output_dir" in message
    assert record(of("run"))["settings"][setting] == there


def test_reasons_and_ways_are_said(of):
    start(of("run"), 20)
    message = refused(of("run", "laser.beta=0.5", "optimizer.lr=0.1"))
    assert (
        "the score that was trained is of this token, place and scale; with another all scores would jump"
        in message
    )
    assert "a branch may have them, too: another run.output_dir and run.resume=" in message
    assert "optimizer.lr 1e-06 there and 0.1 here; pass --change" in message  # all at once


def test_what_is_learned_changes_on_request_and_run_json_says_since_when(of):
    first = start(of("run"), 20)
    other = of("run", "optimizer.lr=2.0e-6", "model.recompute=full")
    message = refused(other)
    assert "optimizer.lr 1e-06 there and 2e-06 here" in message and "model.recompute" not in message
    assert "pass --change to go on with them from step 21 on" in message
    second = start(other, change=True)
    assert second.owner.id == first.owner.id
    found = [(one.step, one.key, one.before, one.after, one.kind) for one in read_changes(second.path)]
    assert found == [
        (21, "model.recompute", "none", "full", "running"),
        (21, "optimizer.lr", 1e-6, 2e-6, "learning"),
    ]
    assert found == [(one.step, one.key, one.before, one.after, one.kind) for one in second.changes]
    (change,) = [one for one in record(other)["changes"] if one["key"] == "optimizer.lr"]
    assert change["from"] == 1e-6 and change["to"] == 2e-6 and change["time"].endswith("Z")
    assert record(other)["settings"]["optimizer.lr"] == 2e-6


def test_a_change_counts_from_the_checkpoint_and_need_not_be_allowed_twice(of):
    """The run ends before it has saved with the new rate: the next start makes the same change again, once."""
    start(of("run"), 20)
    other = of("run", "optimizer.lr=2.0e-6")
    start(other, change=True)
    start(other)
    assert [(one.step, one.key) for one in read_changes(other.run.output_dir)] == [(21, "optimizer.lr")]
    start(of("run"))  # as it was at step 20
    assert read_changes(other.run.output_dir) == []
    start(other, 40, change=True)
    assert "optimizer.lr 2e-06 there and 1e-06 here" in refused(of("run"))
    start(of("run"), change=True)
    changes = [(one.step, one.before, one.after) for one in read_changes(other.run.output_dir)]
    assert changes == [(21, 1e-6, 2e-6), (41, 2e-6, 1e-6)]


def test_a_run_of_an_earlier_version_is_compared_by_what_it_has_written(of):
    start(of("run"), 20)
    file = of("run").run.output_dir / "run.json"
    old = record(of("run"))
    settings = {key: value for key, value in old["settings"].items() if kind_of(key) != "running"}
    file.write_text(json.dumps({"name": "run", "id": old["id"], "settings": settings}))
    start(of("run", "parallel.tensor=2"))  # how it ran nobody knows
    assert read_changes(file.parent) == []
    start(of("run"))
    assert [one.key for one in read_changes(file.parent)] == ["parallel.tensor"]


def test_readouts_are_recorded_as_they_come_to_and_undone_as_they_were_written(of):
    before, after = of("run", "laser.readouts=[{weight: 0.2}]"), of("run", "laser.readouts=[{weight: 0.3}]")
    start(before, 20)
    start(after, 40, change=True)
    (change,) = read_changes(after.run.output_dir)
    assert (change.step, change.key, change.before, change.after) == (
        21,
        "laser.readouts[0].weight",
        0.2,
        0.3,
    )
    shutil.rmtree(folders.checkpoint_root(after) / "step_00000040")
    start(before)
    assert read_changes(after.run.output_dir) == []


def test_lasers_settings_are_not_compared_where_laser_is_off(of):
    off = ("laser.enabled=false", "laser.score_token=null", "laser.ref_logprob=null")
    start(of("run", *off), 20)
    assert "laser.enabled False there and True here; pass --change" in refused(of("run"))
    start(of("run"), change=True)


def test_the_same_files_elsewhere_are_the_same_run_and_other_ones_are_not(of, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def right(response, answer):\n    return 1.0\n")
    start(of("run", f"reward.function={reward}:right"), 20)
    (tmp_path / "new").mkdir()
    for name in ("model", "train.jsonl", "reward.py"):
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    new = tmp_path / "new"
    moved = [f"model.path={new / 'model'}", f"data.train={new / 'train.jsonl'}"]
    moved += [f"reward.function={new / 'reward.py'}:right"]
    start(of("run", *moved))
    found = [(one.key, one.kind) for one in read_changes(tmp_path / "run")]
    assert found == [("data.train", "running"), ("model.path", "running"), ("reward.function", "running")]

    names = {"model.path": "model/config.json", "data.train": "train.jsonl", "reward.function": "reward.py"}
    for key, name in names.items():
        other = tmp_path / f"other_{key}"
        shutil.copytree(new, other)
        start(of("run", *moved))
        (other / name).write_text((other / name).read_text() + "\n")
        elsewhere = [one.replace(str(new), str(other)) if one.startswith(key) else one for one in moved]
        assert f"belongs to another run: {key} " in refused(of("run", *elsewhere))


@pytest.fixture
def parent(of):
    """The configuration of a run with checkpoints of steps 20 and 40, whose rate was doubled after step 20."""
    start(of("parent"), 20)
    config = of("parent", "optimizer.lr=2.0e-6")
    held = claim_output_folder(config, change=True)
    save(config, 40, held.owner)
    held.release()
    (held.path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(46)) + '{"st')
    events = [
        {"step": 20, "kind": "checkpoint", "text": "saved"},
        {"step": 41, "kind": "stop", "text": "stopped"},
    ]
    (held.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return config


@pytest.mark.parametrize(
    ("named", "step"),
    [
        ("parent", 40),
        ("parent/checkpoints", 40),
        ("parent/checkpoints/step_20", 20),
        ("parent/checkpoints/step_00000040", 40),
    ],
)
def test_a_branch_begins_with_the_checkpoint_and_leaves_the_other_run_as_it_is(
    of, parent, tmp_path, named, step
):
    alive = claim_output_folder(parent)  # it trains
    before = everything(parent.run.output_dir)
    branch = of("branch", f"run.resume={tmp_path / named}", "optimizer.lr=5.0e-6", "laser.beta=0.5")
    held = claim_output_folder(branch)
    assert everything(parent.run.output_dir) == before
    alive.release()
    ((saved, path),) = folders.published(folders.checkpoint_root(branch))
    folders.verify(path)
    state = folders.read_state(path)
    assert saved == step and state["run"] == {"cursor": 4 * step, "owner": asdict(held.owner)}
    origin = record(branch)["branched_from"]
    assert origin["folder"] == str(tmp_path / "parent") and origin["step"] == step
    assert origin["id"] == record(parent)["id"] != record(branch)["id"]
    lines = [json.loads(line)["step"] for line in (held.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(step + 1))
    (event,) = map(json.loads, (held.path / "events.jsonl").read_text().splitlines())
    assert event["step"] == 20 and event["run"] == str(tmp_path / "parent")
    # Its own changes are from the values of that step; those of the other run's further steps are not its own.
    rate = [(one.step, one.before, one.after) for one in read_changes(held.path) if one.key == "optimizer.lr"]
    assert rate == ([(21, 1e-6, 5e-6)] if step == 20 else [(21, 1e-6, 2e-6), (41, 2e-6, 5e-6)])
    assert [(one.kind, one.after) for one in held.changes if one.key == "laser.beta"] == [("identity", 0.5)]


def test_a_branch_goes_on_in_itself_with_the_same_settings(of, parent, tmp_path):
    branch = of("branch", f"run.resume={tmp_path / 'parent' / 'checkpoints' / 'step_20'}")
    owner = start(branch).owner
    save(branch, 30, owner)
    shutil.rmtree(tmp_path / "parent")  # it needs the other run no more
    again = claim_output_folder(branch)
    again.release()
    assert again.owner.id == owner.id and again.changes == () == again.told
    assert [step for step, _ in folders.published(folders.checkpoint_root(branch))] == [20, 30]
    assert "optimizer.lr 1e-06 there and 3e-06 here; pass --change" in refused(
        of("branch", branch_of(branch), "optimizer.lr=3.0e-6")
    )


def branch_of(config):
    return f"run.resume={config.run.resume}"


def test_a_branch_whose_start_was_cut_off_is_begun_again(of, parent, tmp_path, monkeypatch):
    branch = of("branch", f"run.resume={tmp_path / 'parent'}", "optimizer.lr=2.0e-6")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            claim_output_folder(branch)
    started = record(branch)["id"]
    start(branch)
    assert record(branch)["id"] == started
    assert [step for step, _ in folders.published(folders.checkpoint_root(branch))] == [40]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["run.seed=7"],
            "of step 40 with other values: run.seed 1 there and 7 here; the order of the problems",
        ),
        (["run.steps=30"], "is of step 40, beyond run.steps 30; raise run.steps"),
        (
            ["run.resume={0}/parent/checkpoints/step_30"],
            "there is no such folder; {0}/parent/checkpoints has those of steps 20, 40",
        ),
        (
            ["run.resume={0}/nowhere"],
            "there is no such folder. Expected auto, never, step N, or the folder of a run",
        ),
        (["run.resume={0}/model"], "no checkpoint is in {0}/model/checkpoints or {0}/model"),
        (["run.resume=step 20"], "run.resume step 20: run.output_dir {0}/branch holds no run"),
    ],
)
def test_a_branch_that_cannot_be_begun_says_why_and_writes_nothing(of, parent, tmp_path, settings, said):
    settings = [one.format(tmp_path) for one in [f"run.resume={tmp_path / 'parent'}", *settings]]
    message = refused(of("branch", *settings))
    assert said.format(tmp_path) in message
    assert {path.name for path in (tmp_path / "branch").iterdir()} <= {"run.lock"}


def test_a_branch_does_not_begin_in_the_folder_of_another_run(of, parent, tmp_path):
    start(of("run"), 20)
    branch = f"run.resume={tmp_path / 'parent'}"
    assert "holds a run that is no branch, and run.resume names" in refused(of("run", branch))
    assert "holds a run that is no branch" in refused(of("parent", branch, "optimizer.lr=2.0e-6"))
    start(of("branch", branch))
    message = refused(of("branch", f"run.resume={tmp_path / 'run'}"))
    assert f"holds a branch of {tmp_path / 'parent'}, and run.resume names {tmp_path / 'run'}" in message


def test_going_back_moves_what_came_later_aside_once(of, parent, tmp_path):
    folder = tmp_path / "parent"
    for name in (
        "rollouts/step_20.jsonl",
        "rollouts/step_40.jsonl",
        "evaluation/validation_step_40.json",
        "FINISHED",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"step": 45}')
    metrics = (folder / "metrics.jsonl").read_bytes()
    back = of("parent", "run.resume=step 20", "optimizer.lr=2.0e-6")
    assert "optimizer.lr 1e-06 there and 2e-06 here" not in refused(of("parent", "run.resume=step 30"))
    # At step 20 the rate was another one; the change was allowed before.
    held = start(back)
    aside = folder / "moved_aside" / "after_step_20.1"
    assert held.told == (f"goes back to step 20: what came after it is in {aside}",)
    assert [step for step, _ in folders.published(folder / "checkpoints")] == [20]
    folders.verify(aside / "checkpoints" / "step_00000040")
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    moved = {str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()} - {"config.yaml"}
    assert {"rollouts/step_40.jsonl", "evaluation/validation_step_40.json", "FINISHED", "run.json"} <= moved
    assert (folder / "rollouts" / "step_20.jsonl").exists() and "rollouts/step_20.jsonl" not in moved
    assert [(one.step, one.after) for one in read_changes(folder)] == [(21, 2e-6)]

    save(back, 30, held.owner)
    assert start(back).told == ()  # it was carried out
    assert [step for step, _ in folders.published(folder / "checkpoints")] == [20, 30]
    start(of("parent", "optimizer.lr=2.0e-6"), change=True)
    assert start(back).told == (
        f"goes back to step 20: what came after it is in {aside.with_name('after_step_20.2')}",
    )


def test_going_back_to_a_step_without_a_checkpoint_names_those_that_there_are(of, parent):
    message = refused(of("parent", "run.resume=step 30"))
    assert "has no checkpoint of step 30; there are those of steps 20, 40" in message


@pytest.mark.parametrize("value", ["3", "null", "[]", "''"])
def test_a_resume_that_is_none_is_refused_when_it_is_read(of, value):
    with pytest.raises(ConfigError, match=r"run\.resume: expected auto, never, step N, or the folder"):
        of("run", f"run.resume={value}")


def test_overwriting_leaves_a_folder_with_other_peoples_files(of, tmp_path):
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "train.parquet").write_text("")
    for _ in range(2):
        with pytest.raises(ConfigError) as error:
            move_aside(of("home"))
        message = str(error.value)
        assert (
            f"run.output_dir {home} is no run's folder (no run.json): thesis, train.parquet are not moved"
            in message
        )
        assert "choose another run.output_dir, or move by hand what is yours" in message
    start(of("home"))
    with pytest.raises(ConfigError, match=r"holds more than a run: thesis, train\.parquet are not moved"):
        claim_output_folder(of("home"), overwrite=True)
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["checkpoints", "thesis"]
    (home / "thesis").rmdir()
    (home / "train.parquet").rename(home / "slurm-17.out")  # a log is a run's
    held = start(of("home"), overwrite=True)
    assert [entry.to for entry in held.moved] == [tmp_path / "home.old-1"]


@pytest.mark.parametrize("name", ["checkpoints", "hf", "wandb"])
def test_a_folder_of_the_same_name_makes_no_run(of, tmp_path, name):
    """Without a run's record and lock it is somebody else's: a model, another trainer's checkpoints."""
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "model.safetensors").write_text("")
    with pytest.raises(ConfigError, match=rf"no run's folder \(no run\.json\): {name} is not moved"):
        move_aside(of("run"))


def test_overwriting_moves_nothing_before_all_else_is_in_order(of, parent, tmp_path):
    start(of("run"), 20)
    before = everything(tmp_path / "run")
    used = of("other", f"checkpoint.folder={tmp_path / 'shared'}")
    alive = claim_output_folder(used)
    for setting, said in [
        (f"checkpoint.folder={tmp_path / 'shared'}", "is in use by a live run"),
        (f"checkpoint.folder={tmp_path / 'parent' / 'checkpoints'}", "belongs to another run, that of"),
        ("run.resume=step 20", "goes back in the run that --overwrite would move aside"),
        (f"run.resume={tmp_path / 'run'}", "is a run that --overwrite would move aside"),
        (f"run.resume={tmp_path / 'nowhere'}", "there is no such folder"),
    ]:
        assert said in refused(of("run", setting), overwrite=True)
        assert not (tmp_path / "run.old-1").exists()
        now = everything(tmp_path / "run")
        assert {path: now[path] for path in before if path.name != "run.lock"} == {
            path: kept for path, kept in before.items() if path.name != "run.lock"
        }
    alive.release()
    start(of("run", f"run.resume={tmp_path / 'parent'}"), overwrite=True)
    assert Path(tmp_path / "run.old-1" / "checkpoints" / "step_00000020").is_dir()


def test_the_dry_run_says_what_a_start_would_do(of, parent, tmp_path):
    def lines(config, overwrite=False, change=False):
        return list(folder_lines(config, overwrite=overwrite, change=change))

    before = everything(tmp_path)
    assert lines(of("new")) == []
    rate = of("parent", "optimizer.lr=5.0e-6")
    (refusal,) = lines(rate)
    assert refusal.startswith("the run would be refused: run.output_dir ") and "pass --change" in refusal
    assert lines(rate, change=True) == [
        f"run.output_dir {tmp_path / 'parent'} holds this run, which would go on from step 40",
        "changed: optimizer.lr 2e-06 -> 5e-06 from step 41 on (learning)",
    ]
    (line,) = lines(of("parent", "run.resume=step 20"))
    assert line.endswith("which would go back to step 20; what came after it is moved aside")
    branch = [f"run.resume={tmp_path / 'parent'}", "optimizer.lr=2.0e-6"]
    (line,) = lines(of("branch", *branch))
    assert line.endswith(f"would be a branch of the run in {tmp_path / 'parent'} after its step 40")
    assert lines(of("parent"), overwrite=True) == [
        f"run.output_dir {tmp_path / 'parent'} would be moved aside"
    ]
    after = everything(tmp_path)
    del before[tmp_path / "config.yaml"], after[tmp_path / "config.yaml"]  # which `of` writes
    assert after == before


@pytest.mark.parametrize("flags", [[], ["--change"]])
def test_the_commands_flag_reaches_the_start(of, monkeypatch, flags):
    of("run")
    seen = []
    monkeypatch.setattr(
        "megatron_laser.loop.train", lambda config, overwrite: seen.append(may_change()) or "out"
    )
    monkeypatch.setattr("megatron_laser.cli.train.prepare_process", lambda level, is_main: None)
    monkeypatch.setattr("megatron_laser.config.check_layout", lambda *_: None)
    monkeypatch.setattr("megatron_laser.config.read_architecture", lambda *_: None)
    done = CliRunner().invoke(app, ["train", str(of("run").run.output_dir.parent / "config.yaml"), *flags])
    assert done.exit_code == 0, done.output
    assert seen == [bool(flags)] and not may_change()

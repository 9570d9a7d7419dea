"""Branches of a run, and going back to an earlier step, as folders see them."""

import json
import shutil
from dataclasses import asdict

import pytest
from helpers.claimed import configurations, everything, parent_run, record, refused, save, start

from megatron_laser.config import ConfigError
from megatron_laser.run.changes import read_changes
from megatron_laser.run.output_folder import claim_output_folder
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.best import read_best, settle_best


@pytest.fixture
def of(tmp_path):
    return configurations(tmp_path)


@pytest.fixture
def parent(of):
    return parent_run(of)


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


def test_a_branch_of_a_copied_run_begins_with_the_checkpoints_of_the_copy(of, parent, tmp_path):
    shutil.copytree(tmp_path / "parent", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "step_00000040")  # the other one has trained on
    branch = of("branch", f"run.resume={tmp_path / 'copy'}")
    start(branch)
    assert [step for step, _ in folders.published(folders.checkpoint_root(branch))] == [20]
    assert record(branch)["branched_from"]["folder"] == str(tmp_path / "copy")


@pytest.mark.parametrize("inner", ["inner", "checkpoints", "checkpoints/branch"])
def test_a_branch_does_not_begin_inside_the_run_that_it_only_reads(of, parent, tmp_path, inner):
    message = refused(of(f"parent/{inner}", f"run.resume={tmp_path / 'parent'}"))
    assert f"run.output_dir {tmp_path / 'parent' / inner} lies in {tmp_path / 'parent'}" in message
    assert not (tmp_path / "parent" / inner / "run.json").exists()


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


def test_going_back_behind_the_best_makes_the_best_of_then_the_best_again(of, parent, tmp_path):
    folder, root = tmp_path / "parent", tmp_path / "parent" / "checkpoints"
    best = {
        step: {"best": {"step": step, "metric": "eval/accuracy", "mode": "max", "value": step}}
        for step in (20, 40)
    }
    state = root / "step_00000020" / "state.json"
    changed = json.loads(state.read_text())
    changed["run"] |= best[20]
    state.write_text(json.dumps(changed))
    manifest = state.with_name("manifest.json")
    manifest.unlink()
    manifest.write_text(json.dumps(folders.digests(manifest.parent, "")))
    assert settle_best(folder, root, best[40], 40) == 40
    (folder / "hf_best").mkdir()
    start(of("parent", "run.resume=step 20"), change=True)
    assert read_best(folder).step == 20 and (root / "best").resolve().name == "step_00000020"
    aside = folder / "moved_aside" / "after_step_20.1"
    assert read_best(aside).step == 40 and (aside / "hf_best").is_dir()
    assert not (folder / "hf_best").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weights", "weights has 3 bytes, and 10 were written"),
        ("state.json", "state.json cannot be read"),
        ("manifest.json", "manifest.json cannot be read"),
        ("", "weights is missing"),
    ],
)
def test_nothing_is_moved_for_a_checkpoint_that_is_cut_off(of, parent, tmp_path, name, said):
    checkpoint = tmp_path / "parent" / "checkpoints" / "step_00000020"
    if name:
        (checkpoint / name).write_text("cut")
    else:
        (checkpoint / "weights").unlink()
    message = refused(of("parent", "run.resume=step 20"), change=True)
    assert f"run.resume step 20: the checkpoint {checkpoint} cannot be used" in message and said in message
    assert "nothing was moved. Other checkpoints are of steps 40" in message
    assert not (tmp_path / "parent" / "moved_aside").exists()


@pytest.mark.parametrize("value", ["3", "null", "[]", "''"])
def test_a_resume_that_is_none_is_refused_when_it_is_read(of, value):
    with pytest.raises(ConfigError, match=r"run\.resume: expected auto, never, step N, or the folder"):
        of("run", f"run.resume={value}")

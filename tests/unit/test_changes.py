"""Settings that are changed between two starts, and overwriting, as folders see them."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.claimed import configurations, everything, parent_run, record, refused, start
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
    return configurations(tmp_path)


@pytest.fixture
def parent(of):
    return parent_run(of)


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

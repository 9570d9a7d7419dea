"""One run's checkpoints are never another's: shared, copied, moved, converted and older folders of checkpoints."""

import json
import shutil
from dataclasses import asdict

import pytest
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.run.output_folder import claim_output_folder, move_aside
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.ownership import read_owner


@pytest.fixture
def of(tmp_path):
    """The configuration of the run in output folder `name`, with its checkpoints in `checkpoints`."""
    (tmp_path / "model").mkdir()

    def build(name, checkpoints=None, *overrides):
        elsewhere = [] if checkpoints is None else [f"checkpoint.folder={tmp_path / checkpoints}"]
        output = f"run.output_dir={tmp_path / name}"
        return run_config(tmp_path, tmp_path / "model", output, *elsewhere, *overrides)

    return build


def save(root, step, run):
    partial = folders.partial_folder(root, step)
    partial.mkdir(parents=True)
    return folders.publish(partial, {"step": step, "run": run}, {})


def start_and_save(config, step=2):
    """As much of a run as the folders see of it; its owner."""
    held = claim_output_folder(config)
    save(folders.checkpoint_root(config), step, {"cursor": 4, "owner": asdict(held.owner)})
    held.release()
    return held.owner


def refused(config):
    with pytest.raises(ConfigError) as error:
        claim_output_folder(config)
    return str(error.value)


def make_older(config):
    """What an earlier version would have left: neither output folder nor checkpoints know an id."""
    output = config.run.output_dir
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({"name": record["name"], "settings": record["settings"]}))
    root = folders.checkpoint_root(config)
    (root / "owner.json").unlink()
    for _, path in folders.published(root):
        state = json.loads((path / "state.json").read_text())
        del state["run"]["owner"]
        (path / "state.json").write_text(json.dumps(state))


def test_another_run_in_the_same_folder_of_checkpoints_is_refused_before_it_begins(of, tmp_path):
    owner = start_and_save(of("first", "shared"))
    message = refused(of("second", "shared"))
    assert (
        f"checkpoint.folder {tmp_path / 'shared'} belongs to another run, that of {tmp_path / 'first'}"
        in message
    )
    assert "choose another checkpoint.folder" in message
    assert refused(of("second", "shared")) == message  # the first attempt has claimed nothing
    assert read_owner(tmp_path / "shared") == owner
    assert claim_output_folder(of("first", "shared")).owner == owner


def test_it_is_refused_although_the_first_run_has_not_saved_yet(of):
    claim_output_folder(of("first", "shared")).release()
    assert "belongs to another run" in refused(of("second", "shared"))


def test_the_folder_of_another_run_inside_its_output_folder_is_no_exception(of):
    start_and_save(of("first"))
    assert "belongs to another run" in refused(of("second", "first/checkpoints"))


def test_a_live_run_is_the_only_one_in_its_folder_of_checkpoints(of, tmp_path):
    held = claim_output_folder(of("first", "shared"))
    assert f"checkpoint.folder {tmp_path / 'shared'} is in use by a live run" in refused(
        of("second", "shared")
    )
    held.release()


def test_checkpoints_may_lie_in_the_output_folder_itself(of):
    config = of("first", "first")
    owner = start_and_save(config)
    assert claim_output_folder(config).owner == owner


def test_overwriting_moves_the_runs_checkpoints_aside_with_it(of, tmp_path):
    first = start_and_save(of("out", "shared"))
    moved = {entry.what: entry.to for entry in move_aside(of("out", "shared"))}
    assert moved == {
        f"checkpoints in {tmp_path / 'shared'}": tmp_path / "shared" / "old-1",
        str(tmp_path / "out"): tmp_path / "out.old-1",
    }
    held = claim_output_folder(of("out", "shared"))
    assert held.owner.id != first.id
    assert folders.published(tmp_path / "shared") == []
    held.release()
    again = claim_output_folder(of("out.old-1", "shared/old-1"))  # what was moved aside goes on
    assert again.owner.id == first.id
    again.release()


def test_overwriting_moves_checkpoints_of_an_earlier_run_of_the_same_output_folder(of, tmp_path):
    start_and_save(of("out", "shared"))
    shutil.rmtree(tmp_path / "out")
    claim_output_folder(of("out")).release()  # another run, with its checkpoints in the folder
    assert "pass --overwrite" in refused(of("out", "shared"))
    move_aside(of("out", "shared"))
    claim_output_folder(of("out", "shared")).release()


@pytest.mark.parametrize("checkpoints", [None, "shared"])
def test_a_first_start_that_was_cut_off_between_its_files_can_be_repeated(of, tmp_path, checkpoints):
    claim_output_folder(of("out", checkpoints)).release()
    for name in ("run.json", "config.yaml"):
        (tmp_path / "out" / name).unlink()
    claim_output_folder(of("out", checkpoints)).release()


def test_overwriting_leaves_another_runs_checkpoints_and_moves_nothing(of, tmp_path):
    start_and_save(of("first", "shared"))
    claim_output_folder(of("second", "own")).release()
    with pytest.raises(ConfigError, match=r"belongs to another run, that of .*first"):
        move_aside(of("second", "shared"))
    assert (tmp_path / "second").exists() and not (tmp_path / "second.old-1").exists()


def test_an_output_folder_deleted_by_hand_leaves_checkpoints_that_are_not_the_next_runs(of, tmp_path):
    start_and_save(of("out", "shared"))
    shutil.rmtree(tmp_path / "out")
    assert "belongs to a run that was in run.output_dir" in refused(of("out", "shared"))
    assert "pass --overwrite" in refused(of("out", "shared"))
    move_aside(of("out", "shared"))
    claim_output_folder(of("out", "shared")).release()


@pytest.mark.parametrize("checkpoints", [None, "shared"])
def test_a_moved_run_goes_on(of, tmp_path, checkpoints):
    owner = start_and_save(of("first", checkpoints))
    (tmp_path / "first").rename(tmp_path / "moved")
    for _ in range(2):
        held = claim_output_folder(of("moved", checkpoints))
        assert held.owner.id == owner.id
        held.release()


def test_a_copied_run_goes_on_beside_the_first(of, tmp_path):
    owner = start_and_save(of("first"))
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert claim_output_folder(of("copy")).owner.id == owner.id
    assert claim_output_folder(of("first")).owner.id == owner.id


def test_a_copied_run_with_the_firsts_checkpoints_is_told_to_copy_them_too(of, tmp_path):
    start_and_save(of("first", "shared"))
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    message, copy = refused(of("copy", "shared")), tmp_path / "copy"
    assert f"belongs to the run in {tmp_path / 'first'}, of which run.output_dir {copy} is a copy" in message
    shutil.copytree(tmp_path / "shared", tmp_path / "shared_copy")
    claim_output_folder(of("copy", "shared_copy")).release()


def test_checkpoints_copied_without_their_run_are_refused_with_the_ways_there_are(of, tmp_path):
    start_and_save(of("first"))
    source, target = tmp_path / "first" / "checkpoints", tmp_path / "second" / "checkpoints"
    shutil.copytree(source / "step_00000002", target / "step_00000002")
    message = refused(of("second"))
    assert f"belongs to another run, that of {tmp_path / 'first'}" in message
    assert "a copy of that whole folder" in message and "convert the checkpoint" in message
    shutil.rmtree(target)
    claim_output_folder(of("second")).release()
    shutil.copytree(source / "step_00000002", target / "step_00000002")
    message = refused(of("second"))
    assert f"checkpoint {target / 'step_00000002'} was saved by another run, that of" in message


def test_checkpoints_that_were_left_in_another_folder_are_pointed_to(of, tmp_path):
    start_and_save(of("out", "before"))
    message = refused(of("out", "now"))
    assert f"Go on with checkpoint.folder={tmp_path / 'before'}" in message
    (tmp_path / "before" / "step_00000002").rename(tmp_path / "now" / "step_00000002")
    claim_output_folder(of("out", "now")).release()


def test_a_converted_checkpoint_is_anybodys_until_a_run_takes_it(of, tmp_path):
    save(tmp_path / "shared", 0, None)
    owner = claim_output_folder(of("first", "shared")).owner
    assert read_owner(tmp_path / "shared") == owner
    assert "belongs to another run" in refused(of("second", "shared"))


@pytest.mark.parametrize("checkpoints", [None, "shared"])
def test_a_run_of_an_earlier_version_goes_on_and_takes_its_checkpoints(of, checkpoints):
    config = of("first", checkpoints)
    start_and_save(config)
    make_older(config)
    owner = claim_output_folder(config).owner
    assert read_owner(folders.checkpoint_root(config)) == owner
    assert claim_output_folder(config).owner == owner


def test_a_first_start_on_an_earlier_versions_run_may_be_cut_off_anywhere(of):
    config = of("first", "shared")
    start_and_save(config)
    make_older(config)
    before = (config.run.output_dir / "run.json").read_text()
    owner = claim_output_folder(config).owner
    (config.run.output_dir / "run.json").write_text(before)
    assert claim_output_folder(config).owner == owner


def test_checkpoints_of_an_earlier_version_are_not_a_new_runs(of, tmp_path):
    config = of("first", "shared")
    start_and_save(config)
    make_older(config)
    message = refused(of("second", "shared"))
    assert "was saved by a run of an earlier version, and run.output_dir" in message
    claim_output_folder(of("third", "own")).release()
    assert "was saved by a run of an earlier version" in refused(of("third", "shared"))


@pytest.mark.parametrize("text", ["", "[]", '{"id": 3}'])
def test_a_record_of_the_owner_that_is_none_is_named(of, tmp_path, text):
    claim_output_folder(of("first")).release()
    (tmp_path / "first" / "checkpoints" / "owner.json").write_text(text)
    assert "owner.json, which names the run that the checkpoints belong to, cannot be read" in refused(
        of("first")
    )

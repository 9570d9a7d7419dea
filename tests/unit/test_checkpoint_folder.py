"""Checkpoint folders on the disk: published or not there, listed with checksums, pruned."""

import json

import pytest

from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.folder import CheckpointError


def publish(root, step, **state):
    partial = folders.partial_folder(root, step)
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"weights of step %d" % step)
    return folders.publish(partial, {"step": step, **state}, folders.digests(partial, "__0_"))


def steps(root):
    return [step for step, _ in folders.published(root)]


def test_what_is_published_reads_back_and_verifies(tmp_path):
    path = publish(tmp_path, 3, run={"cursor": {"epoch": 1}})
    assert path == tmp_path / "step_00000003"
    assert folders.read_state(path)["run"] == {"cursor": {"epoch": 1}}
    folders.verify(path)
    assert {file.name for file in path.iterdir()} == {"__0_0.distcp", "state.json", "manifest.json"}


def test_a_folder_that_a_killed_run_left_half_written_is_not_found_and_goes_away(tmp_path):
    publish(tmp_path, 3)
    folders.partial_folder(tmp_path, 6).mkdir()
    (tmp_path / "step_00000009").mkdir()  # renamed by hand, without a state
    assert steps(tmp_path) == [3]
    folders.remove_partials(tmp_path)
    assert not folders.partial_folder(tmp_path, 6).exists()


def test_publishing_a_step_again_replaces_it(tmp_path):
    publish(tmp_path, 3, note="old")
    assert folders.read_state(publish(tmp_path, 3, note="new"))["note"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [
        (1, 0, [12]),
        (2, 0, [10, 12]),
        (1, 4, [4, 8, 12]),
        (3, 6, [6, 8, 10, 12]),
        (9, 0, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_the_newest_and_the_multiples_are_kept(tmp_path, keep_last, keep_every, kept):
    for step in range(2, 13, 2):
        publish(tmp_path, step)
    folders.retain(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert steps(tmp_path) == kept
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_a_flipped_byte_is_found_by_name_and_the_older_checkpoint_is_recommended(tmp_path):
    publish(tmp_path, 3)
    path = publish(tmp_path, 6)
    file = path / "__0_0.distcp"
    file.write_bytes(b"Weights of step 6")
    with pytest.raises(CheckpointError) as error:
        folders.verify(path)
    assert str(error.value) == (
        f"checkpoint {path}: __0_0.distcp is damaged (its bytes differ from those that were written); "
        f"delete {path} to continue from step_00000003"
    )


def test_a_missing_file_is_found_by_name(tmp_path):
    path = publish(tmp_path, 3)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError) as error:
        folders.verify(path)
    assert str(error.value) == (
        f"checkpoint {path}: __0_0.distcp is missing; no older checkpoint is left: delete {path} to start from "
        "the beginning"
    )


def test_parts_of_the_verification_cover_every_file(tmp_path):
    path = publish(tmp_path, 3)
    (path / "state.json").write_text((path / "state.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        for part in range(3):
            folders.verify(path, part=part, parts=3)


def test_a_newer_format_is_refused(tmp_path):
    path = publish(tmp_path, 3)
    state = json.loads((path / "state.json").read_text()) | {"format_version": 99}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError) as error:
        folders.read_state(path)
    assert str(error.value) == (
        f"checkpoint {path} has format 99, this version of megatron_laser reads up to {folders.FORMAT_VERSION}; "
        "upgrade megatron_laser"
    )


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"step": 3}'])
def test_an_unreadable_state_is_told(tmp_path, text):
    path = publish(tmp_path, 3)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step_00000003: state\.json cannot be read .*delete"):
        folders.read_state(path)


def test_an_unreadable_manifest_is_told(tmp_path):
    path = publish(tmp_path, 3)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step_00000003: manifest\.json cannot be read .*delete"):
        folders.verify(path)

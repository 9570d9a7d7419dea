"""Which responses are held, and the file that they are in."""

import io

import numpy as np
import pytest
from helpers.held import batch
from helpers.rollouts import R, T, W, rollout_batch
from helpers.runs import run_config

from megatron_laser.distributed.broadcast import save_arrays
from megatron_laser.errors import DataError
from megatron_laser.trainer.held_responses import (
    HELD,
    HeldResponses,
    first_scored,
    only,
    read_held,
    write_held,
)

ALL = [0, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("least", "expected"),
    [(1, [0, 2]), (2, [0, 2]), (3, [0, 2, 3, 4, 5]), (5, [0, 2, 3, 4, 5]), (6, ALL), (100, ALL)],
)
def test_whole_groups_are_held_until_there_are_enough(least, expected):
    """Of [R, T, W], [W, R, W], [R, R, T]; what was cut off has no score."""
    assert first_scored(batch(1), least).tolist() == expected


def test_nothing_is_held_of_a_batch_without_scores_or_of_what_was_not_graded():
    assert first_scored(rollout_batch([[T(3), T(2)]]), 1).tolist() == []
    flat = rollout_batch([[R(3), W(2)]])
    flat.rewards[0] = np.nan
    assert first_scored(flat, 2).tolist() == [1]


def test_what_is_held_has_its_own_tokens_and_verdicts():
    flat = batch(1)
    kept = only(flat, np.array([2, 3]), step=7)
    assert (kept.step, kept.num_samples) == (7, 2)
    for place, index in enumerate((2, 3)):
        assert kept.prompt_ids(place).tolist() == flat.prompt_ids(index).tolist()
        assert kept.response_ids(place).tolist() == flat.response_ids(index).tolist()
        assert kept.rewards[place] == flat.rewards[index] and kept.scored[place]
        assert kept.group_ids[place] == flat.group_ids[index]
        assert kept.pack_input(place).response_ids.tolist() == flat.pack_input(index).response_ids.tolist()


@pytest.fixture
def config(tmp_path):
    found = run_config(tmp_path, tmp_path / "model", laser={"drift_every": 5, "drift_samples": 2})
    (tmp_path / "run").mkdir()
    return found


def held():
    return HeldResponses(only(batch(1), np.array([0, 2]), step=1), -6.25)


def test_the_file_gives_back_what_was_written(config, tmp_path):
    assert read_held(config) is None
    file = write_held(config, held())
    assert file == tmp_path / "run" / HELD and [path.name for path in file.parent.iterdir()] == [HELD]
    found, expected = read_held(config), held()
    assert found.c_ref == -6.25
    for name, array in expected.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[name], array, err_msg=name)
    off = run_config(tmp_path, tmp_path / "model", laser={"drift_every": 0})
    assert read_held(off) is None


def changed(**arrays):
    file = io.BytesIO()
    kept = {name: array for name, array in (held().to_arrays() | arrays).items() if array is not None}
    save_arrays(file, kept)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"no archive", "cannot be read"),
        (changed()[:-100], "cannot be read"),
        (changed(c_ref=None), "'c_ref' is missing"),
        (changed(tokens=None), "arrays are"),
        (changed(format_version=np.array(2)), "format 2; this version of megatron_laser reads up to 1"),
        (changed(scored=np.zeros(2, np.uint8)), "responses that all are scored"),
        (changed(c_ref=np.array(np.nan)), "finite c_ref"),
        (changed(response_lengths=np.array([5, 6], np.int32)), "FlatBatch"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_to_do(config, content, reason):
    (config.run.output_dir / HELD).write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        read_held(config)
    assert "delete it, and the run takes responses of its next step" in str(error.value)
    assert "set laser.drift_every to 0" in str(error.value)

"""Batches on the disk: read back as they were, and refused when they are not."""

import json
import math

import numpy as np
import pytest

from megatron_laser.batching.flat import flatten
from megatron_laser.errors import DataError
from megatron_laser.run.recorded_batches import read_batch, read_origin, recorded_steps, write_batch
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample, TokenSets, WeightSpan

ORIGIN = {"run": "first", "vocab_size": 40}
PROGRESS = {"epoch": 1 / 3, "source/a/epoch": 0.1}


def batch_with_everything():
    """Two groups: of sets, experts, spans, an environment's tokens, a float64 reward and a response without a grade."""
    routed = np.arange(6 * 2 * 2, dtype=np.uint8).reshape(6, 2, 2)
    sets = TokenSets(np.array([2, 0, 1], np.int32), np.array([7, 9, 3], np.int32))
    plain = Generation(
        [7, 8, 3], [-0.1, -0.2, -0.3], "stop", 4, zc_logprob=-9.1, sets=sets, routed_experts=routed
    )
    talked = Generation(
        [5, 6],
        [-0.5, 0.0],
        "length",
        weight_version=3,
        spans=(WeightSpan(3, 1), WeightSpan(4, 1)),
        sampled=np.array([True, False]),
        cut_off=False,
    )
    lost = Generation([4, 4], [-1.0, -1.0], "length", 4)
    first, second = Prompt(3, "1 + 1 ?", "2", [10, 11, 12]), Prompt(9, "é", "3", [13], 2, "a", "exact")
    groups = [
        Group(first, [Sample(first.token_ids, plain, "ja", True, 0.1, "correct", -9.1)]),
        Group(
            second,
            [Sample(second.token_ids, talked, "nein ∞", False, 0.0, "wrong")],
            [Sample(second.token_ids, lost, "lost", False, math.nan, "timeout")],
        ),
    ]
    return RolloutBatch(12, 4, groups, {"prompts_tried": 2, "accuracy_tried": math.nan})


def test_a_batch_is_read_back_with_all_that_it_had(tmp_path):
    batch = batch_with_everything()
    write_batch(tmp_path, batch, PROGRESS, ORIGIN)
    found = read_batch(tmp_path, 12)
    assert (found.progress, found.origin, read_origin(tmp_path, 12)) == (PROGRESS, ORIGIN, ORIGIN)
    assert (found.batch.step, found.batch.weight_version) == (12, 4)
    assert found.batch.metrics["prompts_tried"] == 2 and math.isnan(found.batch.metrics["accuracy_tried"])
    assert [group.prompt for group in found.batch.groups] == [group.prompt for group in batch.groups]
    for there, here in zip(found.batch.samples(), batch.samples(), strict=True):
        assert there == here
        routed, expected = there.generation.routed_experts, here.generation.routed_experts
        assert (routed is None) == (expected is None) and np.array_equal(routed, expected)
        sets, expected = there.generation.sets, here.generation.sets
        assert (sets is None) == (expected is None)
        assert sets is None or (
            np.array_equal(sets.ids, expected.ids) and np.array_equal(sets.counts, expected.counts)
        )
    (lost,) = found.batch.groups[1].ungraded
    assert (lost.text, lost.outcome) == ("lost", "timeout") and math.isnan(lost.reward)
    there, here = flatten(found.batch).to_arrays(), flatten(batch).to_arrays()
    assert there.keys() == here.keys()
    assert all(there[n].dtype == here[n].dtype and there[n].tobytes() == here[n].tobytes() for n in here)


def test_a_later_batch_of_the_same_step_replaces_the_earlier_one(tmp_path):
    batch = batch_with_everything()
    write_batch(tmp_path, batch, PROGRESS, ORIGIN)
    batch.groups.pop()
    write_batch(tmp_path, batch, {}, ORIGIN)
    assert len(read_batch(tmp_path, 12).batch.groups) == 1
    assert recorded_steps(tmp_path) == [12]


def test_a_batch_that_was_cut_off_while_it_was_written_is_none(tmp_path):
    write_batch(tmp_path, batch_with_everything(), PROGRESS, ORIGIN)
    (tmp_path / "step_12.json").unlink()
    assert recorded_steps(tmp_path) == []
    assert recorded_steps(tmp_path / "nothing") == []


def test_damaged_arrays_are_refused_by_their_checksum(tmp_path):
    write_batch(tmp_path, batch_with_everything(), PROGRESS, ORIGIN)
    file = tmp_path / "step_12.npz"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"step_12.npz is damaged: .* step_12.json names"):
        read_batch(tmp_path, 12)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda header: header.update(format_version=2), "has format 2, .* reads up to 1; upgrade"),
        (lambda header: header.pop("origin"), "cannot be read as a recorded batch: KeyError"),
        (lambda header: header["groups"].pop(), "do not belong together"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path, change, message):
    write_batch(tmp_path, batch_with_everything(), PROGRESS, ORIGIN)
    file = tmp_path / "step_12.json"
    header = json.loads(file.read_text())
    change(header)
    file.write_text(json.dumps(header))
    with pytest.raises(DataError, match=message):
        read_batch(tmp_path, 12)

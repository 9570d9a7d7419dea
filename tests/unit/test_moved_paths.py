"""Files that a setting names are the same elsewhere by what is in them."""

import json

import pytest
from helpers.runs import run_config

from megatron_laser.run.moved_paths import contents, same_elsewhere

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder `name` with a weight file of 3 MiB, in which `changed` bytes from `start` on are others."""

    def build(name, start=0, changed=0, **files):
        place = tmp_path / name
        place.mkdir()
        weights = bytearray(3 * MIB)
        weights[start : start + changed] = b"x" * changed
        (place / "model.safetensors").write_bytes(bytes(weights))
        for file, text in {"config": "{}", "tokenizer": "{}", **files}.items():
            (place / f"{file}.json").write_text(text)
        (place / "README.md").write_text(name)  # of no importance
        return place

    return build


def test_a_model_is_the_same_by_configuration_tokenizer_and_weights(folder, tmp_path):
    first = run_config(tmp_path, folder("first"))
    known = contents(first)

    def same(model):
        return same_elsewhere(run_config(tmp_path, model), "model.path", str(first.model.path), known)

    assert same(folder("copy"))
    assert not same(folder("other tokenizer", tokenizer='{"vocab": 3}'))
    assert not same(folder("another file", generation_config="{}"))
    for number, place in enumerate((0, MIB, 3 * MIB - 300_000)):  # a layer's worth of other weights
        assert not same(folder(f"trained {number}", place, 300_000))
    assert not same(tmp_path / "nowhere")


def test_without_a_record_both_folders_are_read_as_long_as_they_are_there(folder, tmp_path):
    first, copy = folder("first"), folder("copy")
    assert same_elsewhere(run_config(tmp_path, copy), "model.path", str(first), {})
    first.rename(tmp_path / "away")
    assert not same_elsewhere(run_config(tmp_path, copy), "model.path", str(first), {})


ROW = '{"problem": "1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("there", "here", "same"),
    [
        (["a.jsonl", "b.jsonl"], ["new/a.jsonl", "new/b.jsonl"], True),
        (["a.jsonl", "b.jsonl"], ["new/b.jsonl", "new/a.jsonl"], False),  # another order is another data set
        (["a.jsonl"], [{"path": "new/a.jsonl"}], True),
        (["a.jsonl"], [{"path": "new/a.jsonl", "reward": "free_text"}], False),
        (
            [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl"}],
            [{"path": "new/a.jsonl", "weight": 2.0}, {"path": "new/b.jsonl"}],
            True,
        ),
        (
            [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl"}],
            [{"path": "new/a.jsonl", "weight": 3.0}, {"path": "new/b.jsonl"}],
            False,
        ),
        (
            [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
            [{"path": "new/a.jsonl"}, {"path": "new/b.jsonl", "name": "other"}],
            False,  # a checkpoint's place among the problems is by these names
        ),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_data_are_the_same_by_their_bytes_order_and_shares(tmp_path, there, here, same, recorded):
    (tmp_path / "new").mkdir()
    for name in ("a", "b"):
        for place in (tmp_path, tmp_path / "new"):
            (place / f"{name}.jsonl").write_text(ROW.replace("1", name))
    before = run_config(tmp_path, tmp_path / "model", data={"train": there})
    now = run_config(tmp_path, tmp_path / "model", data={"train": here})
    value = json.loads(before.model_dump_json())["data"]["train"]
    known = contents(before) if recorded else {}
    assert ("data.train" in known) == recorded
    assert same_elsewhere(now, "data.train", value, known) is same


def test_recorded_batches_and_functions_are_the_same_by_their_files(tmp_path):
    for place in ("first", "copy", "other"):
        (tmp_path / place).mkdir()
        for step in (1, 2):
            (tmp_path / place / f"step_{step}.npz").write_bytes(b"x" * (step + (place == "other")))
            (tmp_path / place / f"step_{step}.json").write_text("{}")
        (tmp_path / place / "mine.py").write_text("def loss(rows): ...\n" + "#" * (place == "other"))

    def config(place, function="loss"):
        settings = {"mode": "train_only", "batches": str(tmp_path / place)}
        policy = {"loss": f"{tmp_path / place / 'mine.py'}:{function}"}
        return run_config(tmp_path, tmp_path / "model", run=settings, policy=policy)

    first = config("first")
    known = contents(first)
    for key, value in (("run.batches", str(first.run.batches)), ("policy.loss", first.policy.loss)):
        assert same_elsewhere(config("copy"), key, value, known)
        assert not same_elsewhere(config("other"), key, value, known)
    assert not same_elsewhere(config("copy", "other_loss"), "policy.loss", first.policy.loss, known)

"""Evaluations and the weights that they are about: by content, whatever names, sizes and times say."""

import json
import os
import shutil

import pytest
from helpers.tiny_run import write_tiny_run
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import load_config
from megatron_laser.evaluation import verification_intervals
from megatron_laser.evaluation.benchmarks.run import evaluate_benchmarks
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
from megatron_laser.evaluation.responses import ResponseFile
from megatron_laser.evaluation.weight_identity import FolderWeights, WeightsChanged
from megatron_laser.loop import train
from megatron_laser.report import benchmark_report
from megatron_laser.testtime import EngineChoice, load_model_folder

OVERRIDES = ["problems.max_problems=3", "problems.samples=4", "problems.max_new_tokens=8"]
OVERRIDES += ["problems.prompt_suffix=''", "problems.apply_chat_template=false"]
OVERRIDES += ["problems.max_prompt_tokens=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_run(folder)
    rows = [{"problem": f"{i} + 1 ?", "answer": str(i + 1)} for i in range(3)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def no_figures_and_coarse_intervals(monkeypatch):
    """What is compared here is whole results: of the bootstrap a few resamples do."""
    monkeypatch.setattr(benchmark_report, "_figures", lambda *_: [])
    monkeypatch.setattr(verification_intervals, "_RESAMPLES", 20)


def save_other_weights(folder, path, seed):
    """A random model of the same size: equal names, equal sizes, other bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).save_pretrained(
        path
    )


@pytest.fixture
def model_copy(folder, tmp_path):
    """The model's files alone, to be changed."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.jsonl", "*.py", "*.yaml", "out*"))
    return copy


def evaluate(folder, model, output, *overrides, **options):
    """(results, bytes of results.json, what was said)"""
    say = []
    settings = [f"problems.reward={folder / 'lucky.py'}:lucky", *OVERRIDES, *overrides]
    results = evaluate_benchmarks(
        load_model_folder(model, score_token="<|score|>", ref_logprob=-3.5, beta=0.5),
        load_benchmarks(folder / "problems.jsonl", settings),
        EngineChoice(max_batch_size=16),
        output,
        deadline=60.0,
        workers=1,
        say=say.append,
        **options,
    )
    return results, (output / "results.json").read_bytes(), "\n".join(say)


def in_place(source, target):
    """Into the same file, as `cp` does."""
    data = source.read_bytes()
    source.unlink()
    with target.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("way", ["copied over", "replaced", "link moved"])
def test_other_weights_of_the_same_name_and_size_are_answered_anew(folder, model_copy, tmp_path, way):
    output, model = tmp_path / "eval", model_copy
    if way == "link moved":
        model = tmp_path / "link"
        model.symlink_to(model_copy)
    first, first_bytes, _ = evaluate(folder, model, output)
    assert evaluate(folder, model, output)[1] == first_bytes

    shutil.copytree(model_copy, tmp_path / "other")
    save_other_weights(folder, tmp_path / "other", seed=1)
    before = (model_copy / "model.safetensors").stat()
    if way == "copied over":
        in_place(tmp_path / "other" / "model.safetensors", model_copy / "model.safetensors")
        os.utime(model_copy / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    elif way == "replaced":
        os.replace(tmp_path / "other" / "model.safetensors", model_copy / "model.safetensors")
    else:
        model.unlink()
        model.symlink_to(tmp_path / "other")
    assert (model / "model.safetensors").stat().st_size == before.st_size

    second, second_bytes, said = evaluate(folder, model, output)
    assert "answering anew" in said and "problems.old-1" in said
    assert second["weights"] != first["weights"]
    fresh = evaluate(folder, model, tmp_path / "fresh")[1]
    assert second_bytes == fresh != first_bytes
    kept = json.loads((output / "problems.old-1" / "records.json").read_text())
    assert kept["zc_logprob_mean"] == first["benchmarks"]["problems"]["summary"]["zc_logprob_mean"]


@pytest.mark.parametrize("settings", [None, "{", "[]"])
def test_responses_without_the_settings_they_were_made_with_are_not_taken(
    folder, model_copy, tmp_path, settings
):
    output = tmp_path / "eval"
    whole = evaluate(folder, model_copy, output)[1]
    file = output / "problems" / "settings.json"
    file.unlink()
    if settings is not None:
        file.write_text(settings)
    save_other_weights(folder, model_copy, seed=1)
    _, second_bytes, said = evaluate(folder, model_copy, output)
    assert "missing or damaged" in said and "problems.old-1" in said
    assert second_bytes != whole


def test_an_interrupted_evaluation_never_goes_on_with_other_weights(folder, model_copy, tmp_path):
    output = tmp_path / "eval"
    whole = evaluate(folder, model_copy, output)[1]
    # as a kill in the middle leaves it: no results, some responses
    (output / "results.json").unlink()
    for name, lines in (("responses.jsonl", 9), ("records.jsonl", 4)):
        file = output / "problems" / name
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:lines]))
    save_other_weights(folder, model_copy, seed=1)
    interrupted = evaluate(folder, model_copy, output)[1]
    assert interrupted == evaluate(folder, model_copy, tmp_path / "fresh")[1] != whole


@pytest.mark.parametrize("way", ["copied over", "replaced"])
def test_weights_that_change_under_an_evaluation(folder, model_copy, tmp_path, monkeypatch, way, caplog):
    """Written over, what is loaded may be both; replaced, the old file stays what it was, and so do the numbers."""
    shutil.copytree(model_copy, tmp_path / "other")
    save_other_weights(folder, tmp_path / "other", seed=1)
    expected = evaluate(folder, model_copy, tmp_path / "undisturbed")[1]
    add = ResponseFile.add

    def changing(self, arrival):
        other = tmp_path / "other" / "model.safetensors"
        if (arrival.row, arrival.sample) == (2, 0) and other.exists():
            (in_place if way == "copied over" else os.replace)(other, model_copy / "model.safetensors")
        return add(self, arrival)

    monkeypatch.setattr(ResponseFile, "add", changing)
    output = tmp_path / "eval"
    if way == "replaced":
        assert evaluate(folder, model_copy, output)[1] == expected
        assert "other weights have taken the place" in caplog.text
        return
    with pytest.raises(WeightsChanged, match=r"overwritten while they were in use\. .*problems\.old-1"):
        evaluate(folder, model_copy, output)
    monkeypatch.undo()
    assert not (output / "results.json").exists()
    anew = evaluate(folder, model_copy, output)[1]
    assert anew == evaluate(folder, model_copy, tmp_path / "fresh")[1] != expected


def test_evaluating_training_more_and_evaluating_again_gives_new_numbers(tmp_path):
    file = write_tiny_run(tmp_path, checkpoint={"every": 2, "export_hf": True})
    rows = (tmp_path / "train.jsonl").read_text().splitlines()[:6]
    (tmp_path / "test.jsonl").write_text("\n".join(rows) + "\n")

    def evaluated():
        arguments = ["eval", tmp_path / "out", tmp_path / "test.jsonl", "test.samples=4"]
        arguments += ["--output", tmp_path / "eval", "--workers", "1"]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return (tmp_path / "eval" / "results.json").read_bytes(), result.output

    train(load_config(file, ["run.steps=2"]))
    first, _ = evaluated()
    again, said = evaluated()
    assert again == first and "all responses were there" in said
    train(load_config(file, ["run.steps=4"]))
    second, said = evaluated()
    assert "answering anew" in said
    old, new = (json.loads(found)["benchmarks"]["test"]["summary"] for found in (first, second))
    assert (
        new["zc_logprob_mean"] != old["zc_logprob_mean"]
        and new["score_wrong_mean"] != old["score_wrong_mean"]
    )
    again, said = evaluated()
    assert again == second and "all responses were there" in said


def test_an_engine_that_is_given_is_known_by_what_it_holds(folder, tmp_path):
    import torch

    from megatron_laser.rollout.in_process import InProcessEngine

    engine = InProcessEngine(folder, dtype=torch.float32, device=torch.device("cpu"))
    first, first_bytes, _ = evaluate(folder, folder, tmp_path / "eval", engine=engine)
    assert evaluate(folder, folder, tmp_path / "eval", engine=engine)[1] == first_bytes
    weights = [(name, tensor.clone()) for name, tensor in engine.named_parameters().items()]
    engine.update_weights([(name, tensor * 1.5) for name, tensor in weights], 1)
    second, _, said = evaluate(folder, folder, tmp_path / "eval", engine=engine)
    assert "answering anew" in said and second["weights"] != first["weights"]
    engine.update_weights(weights, 2)
    assert evaluate(folder, folder, tmp_path / "eval", engine=engine)[1] == first_bytes


def test_an_edited_reward_judges_the_saved_responses_anew(folder, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(response, answer):\n    return 1.0\n")
    override = f"problems.reward={reward}:mine"
    first, _, _ = evaluate(folder, folder, tmp_path / "eval", override)
    assert first["benchmarks"]["problems"]["summary"]["accuracy"] == 1.0
    responses = (tmp_path / "eval" / "problems" / "responses.jsonl").read_bytes()
    reward.write_text("def mine(response, answer):\n    return 0.0\n")
    second, _, said = evaluate(folder, folder, tmp_path / "eval", override)
    assert "grading changed" in said
    assert second["benchmarks"]["problems"]["summary"]["accuracy"] == 0.0
    assert (tmp_path / "eval" / "problems" / "responses.jsonl").read_bytes() == responses


def test_a_files_digest_is_kept_by_inode_size_and_times_and_covers_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_laser.evaluation.weight_identity._BLOCK", 1000)  # several blocks and a rest
    file, cache = tmp_path / "model.safetensors", tmp_path / "cache.json"
    content = bytearray(os.urandom(3500))

    def identity():
        weights = FolderWeights(tmp_path, cache=cache)
        weights.close()
        return weights.identity

    def write(age):
        file.write_bytes(content)
        # what changed a moment ago may change again within the same tick of the file system's clock
        monkeypatch.setattr("megatron_laser.evaluation.weight_identity._SETTLED", -1.0 if age else 3600.0)

    write(age=0)
    first = identity()
    assert "model" not in cache.read_text() and json.loads(cache.read_text()) == {}
    found = {first}
    for place in (0, 999, 1000, 2500, 3499):
        content[place] ^= 1
        write(age=1)
        found.add(identity())
        assert len(json.loads(cache.read_text())) == 1
    assert len(found) == 6
    known = identity()
    monkeypatch.setattr(
        "megatron_laser.evaluation.weight_identity._file_digest", lambda *_: pytest.fail("was read again")
    )
    assert identity() == known


def test_a_file_that_is_being_written_has_no_identity_yet(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")

    def meanwhile(*_):
        file.write_bytes(b"other bytes")
        return "0" * 64

    monkeypatch.setattr("megatron_laser.evaluation.weight_identity._file_digest", meanwhile)
    with pytest.raises(WeightsChanged, match="is being written"):
        FolderWeights(tmp_path)


def test_a_file_that_was_only_touched_is_the_same(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    weights = FolderWeights(tmp_path)
    os.utime(file, (1, 1))
    assert weights.changed()
    weights.check()
    assert not weights.changed() and not weights.replaced()
    weights.close()

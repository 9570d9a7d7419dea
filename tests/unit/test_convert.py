"""`megatron-laser convert` on one process: exact both ways, and plain about what it cannot do."""

import json
import shutil

import pytest
import torch
from helpers.models import VOCAB_SIZE, save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.cli.conversion import convert
from megatron_laser.config import read_architecture, resolved_yaml
from megatron_laser.model.hf_folder import HfFolder
from megatron_laser.trainer.checkpoint import convert as conversion_work
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from megatron_laser.trainer.checkpoint.folder import CheckpointError
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer

GROUPS = [
    [Response(9, True), Response(12, False), Response(5, False)],
    [Response(7, False), Response(3, True)],
]


class Run:
    """A run in `folder`/run with its resolved config.yaml beside its checkpoints, as the loop leaves them."""

    def __init__(self, runtime, folder, *overrides):
        self.config = run_config(folder, folder / "model", "checkpoint.every=1", *overrides)
        self.output = folder / "run"
        self.root = self.output / "checkpoints"
        self.output.mkdir(exist_ok=True)
        (self.output / "config.yaml").write_text(resolved_yaml(self.config))
        self.trainer = Trainer(self.config, runtime, score_token_id=SCORE_TOKEN)
        self.checkpoints = CheckpointManager(self.config, runtime, self.trainer.policy)

    def train(self, step):
        metrics = self.trainer.train_step(rollout_batch(GROUPS, seed=step), step).metrics
        return metrics | self.weights()

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.trainer.weight_stream()}

    def saved(self, step=1):
        self.checkpoints.save(step, {"cursor": None})
        assert self.checkpoints.wait()
        return self.root / f"step_{step:08d}"


@pytest.fixture(params=["qwen2", "qwen2-tied"])
def folder(request, tmp_path):
    save_tiny_model(tmp_path / "model", request.param)
    return tmp_path


@pytest.fixture
def untied(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2")
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_loads_equals_the_trained_model(single_process, folder, dtype):
    run = Run(single_process, folder, f"model.dtype={dtype}")
    before = run.weights()
    run.train(1)
    target = convert(run.saved(), folder / "new" / "hf")
    model = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    assert model.dtype == getattr(torch, dtype)
    loaded = dict(model.named_parameters())
    trained = run.weights()
    assert loaded.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained.items())


def test_padded_vocabulary_rows_are_not_exported(single_process, folder):
    run = Run(single_process, folder, "model.vocab_multiple=32")  # 250 rows are stored as 256
    target = convert(run.saved(), folder / "hf")
    with HfFolder(target) as written:
        assert written.shape("model.embed_tokens.weight")[0] == VOCAB_SIZE


def test_small_safetensors_files_hold_the_same_tensors(single_process, untied):
    run = Run(single_process, untied)
    source = run.saved()
    whole = checkpoint_to_hf(source, untied / "whole", model=untied / "model")
    calls = []
    parts = checkpoint_to_hf(
        source,
        untied / "parts",
        model=untied / "model",
        max_shard_bytes=40_000,
        progress=lambda *figures: calls.append(figures),
    )
    assert len(list(parts.glob("*.safetensors"))) > 3
    with HfFolder(whole) as one, HfFolder(parts) as other:
        assert one.names() and set(one.names()) == set(other.names())
        for name in one.names():
            assert torch.equal(one.full(name), other.full(name))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("settings", [(), ("model.dtype=bfloat16",), ("optimizer.distributed=true",)])
def test_a_run_resumed_from_a_converted_model_takes_the_same_first_step(single_process, folder, settings):
    dtype = torch.bfloat16 if "model.dtype=bfloat16" in settings else torch.float32
    expected = Run(single_process, folder, *settings).train(1)
    tied = read_architecture(folder / "model").tied_embeddings
    shutil.move(folder / "model", folder / "elsewhere")
    save_tiny_model(
        folder / "model", "qwen2-tied" if tied else "qwen2", seed=5
    )  # not what the run starts from
    hf_to_checkpoint(folder / "elsewhere", folder / "run" / "checkpoints", dtype=dtype)
    resumed = Run(single_process, folder, *settings)
    state = resumed.checkpoints.resume()
    assert (state["step"], state["run"]) == (0, None)
    got = resumed.train(1)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value)), name


def test_there_and_back_gives_the_same_bytes(untied):
    checkpoint = convert(untied / "model", untied / "checkpoints")
    assert checkpoint == untied / "checkpoints" / "step_00000000"
    folders.verify(checkpoint)
    back = convert(checkpoint, untied / "back", model=untied / "model")
    with HfFolder(untied / "model") as one, HfFolder(back) as other:
        assert set(one.names()) == set(other.names())
        for name in one.names():
            assert torch.equal(one.full(name), other.full(name))


def test_tensors_are_asked_for_one_at_a_time(untied, monkeypatch):
    alive, most = 0, 0
    full = HfFolder.full

    class Counted:
        def __del__(self):
            nonlocal alive
            alive -= 1

    def counted(self, name):
        nonlocal alive, most
        tensor = full(self, name)
        tensor.witness = Counted()
        alive += 1
        most = max(most, alive)
        return tensor

    monkeypatch.setattr(HfFolder, "full", counted)
    hf_to_checkpoint(untied / "model", untied / "checkpoints", dtype=torch.float32)
    assert 1 <= most <= 2


def refused(*arguments, **settings):
    with pytest.raises((CheckpointError, ValueError)) as error:
        convert(*arguments, console=Console(quiet=True), **settings)
    return str(error.value)


def test_a_damaged_checkpoint_is_refused_and_leaves_no_folder(single_process, untied):
    source = Run(single_process, untied).saved()
    file = source / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "__0_0.distcp is damaged" in refused(source, untied / "hf")
    assert not (untied / "hf").exists() and not (untied / "hf.partial").exists()


def test_a_model_of_other_sizes_is_refused_with_both(single_process, untied):
    source = Run(single_process, untied).saved()
    save_tiny_model(untied / "wider", "qwen2", intermediate_size=128)
    message = refused(source, untied / "hf", model=untied / "wider")
    assert "intermediate_size 96 there, 128 here" in message and "name the folder that the run" in message


def test_folders_that_do_not_fit_are_explained(single_process, untied):
    run = Run(single_process, untied)
    source = run.saved()
    assert "name one of them" in refused(run.root, untied / "hf")
    assert "neither a checkpoint's step folder" in refused(untied, untied / "hf")
    assert "already exists" in refused(source, untied / "model")
    assert "already holds step_00000001" in refused(untied / "model", run.root)
    assert "a converted model is step 0" in refused(untied / "model", untied / "x" / "step_00000007")
    assert "--dtype float32 goes with" in refused(source, untied / "hf", dtype="float32")
    assert "--model" in refused(untied / "model", untied / "x", model=untied / "model")
    (run.output / "config.yaml").unlink()
    assert "name its folder with --model" in refused(source, untied / "hf")


def test_a_dtype_that_no_run_has_must_be_named(untied):
    file = untied / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"}))
    assert "says dtype 'float16'; name the run's model.dtype with --dtype" in refused(
        untied / "model", untied / "x"
    )
    assert convert(untied / "model", untied / "x", dtype="bfloat16").is_dir()


def test_weights_that_do_not_fit_their_config_leave_nothing_behind(untied):
    file = untied / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 300}))
    message = refused(untied / "model", untied / "x")
    assert "model.embed_tokens.weight is [250, 64], expected [300, 64]" in message
    assert "lm_head.weight" in message and "config.json and weights disagree" in message
    assert list(untied.glob("x/*")) == []


def test_the_command_says_what_it_wrote_and_exits_with_2_on_bad_folders(untied):
    runner = CliRunner()
    done = runner.invoke(app, ["convert", str(untied / "model"), str(untied / "checkpoints")])
    assert done.exit_code == 0, done.output
    assert "wrote" in done.output and "step_00000000" in done.output
    failed = runner.invoke(app, ["convert", str(untied / "nothing"), str(untied / "hf")])
    assert failed.exit_code == 2
    assert "error:" in failed.output and "neither a checkpoint's step folder" in failed.output


def rewrite(folder, **changes):
    """Some tensors of a folder replaced, or added; None takes one away."""
    tensors = {name: tensor for name, tensor in (load_file(folder / "model.safetensors") | changes).items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.norm.weight": None}, "1 tensor missing"),
        ({"model.norm.bias": torch.zeros(64)}, "model.norm.bias"),
        ({"model.norm.weight": torch.full((64,), torch.nan)}, "'model.norm.weight' holds NaN"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "quantized"),
        ({"lm_head.weight": None}, "set tie_word_embeddings to true"),
    ],
)
def test_a_folder_that_no_run_could_load_becomes_no_checkpoint(untied, change, named):
    rewrite(untied / "model", **change)
    assert named in refused(untied / "model", untied / "x")
    assert list(untied.glob("x/*")) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_of_numbers_that_are_none_becomes_no_model(single_process, untied, value):
    run = Run(single_process, untied)
    with torch.no_grad():
        next(run.trainer.policy.chunks.models[0].parameters())[3, 3] = value
    message = refused(run.saved(), untied / "hf")
    assert "'model.embed_tokens.weight' holds NaN or infinity; convert an earlier checkpoint" in message
    assert not (untied / "hf").exists()


def test_tensors_of_a_checkpoint_that_the_model_has_no_use_for_are_named(untied, monkeypatch):
    source = convert(untied / "model", untied / "checkpoints")
    vocabulary_rows = conversion_work._vocabulary_rows

    def without_norm(config):
        return {name: rows for name, rows in vocabulary_rows(config).items() if name != "model.norm.weight"}

    monkeypatch.setattr(conversion_work, "_vocabulary_rows", without_norm)
    assert "1 tensors that a model of" in refused(source, untied / "hf", model=untied / "model")

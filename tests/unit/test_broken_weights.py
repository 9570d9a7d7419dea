"""Weights that cannot be used, given to every command that reads weights: one line with the file, exit status 2."""

import json
import shutil

import pytest
import torch
from helpers.tiny_run import write_tiny_run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_laser.cli import app

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"
SCORE = ["--score-token", "<|score|>", "--ref-logprob", "-3.5", "--beta", "0.5"]

OVERRIDES = [
    f"train.{name}" for name in ("max_new_tokens=8", "apply_chat_template=false", "max_prompt_tokens=16")
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_tiny_run(folder, model={"path": "model"}, rollout={"deadline": 60})
    names = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
    (folder / "model").mkdir()
    for name in names:
        if (folder / name).is_file():
            (folder / name).rename(folder / "model" / name)
    (folder / "answers.jsonl").write_text(json.dumps({"prompt": "1 + 2 ?", "response": "3"}) + "\n")
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def tensors(**changes):
    def change(file):
        found = load_file(file) | changes
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)

    return change


FAULTS = {
    "cut off": cut,
    "is empty": lambda file: file.write_bytes(b""),
    "is no safetensors file": lambda file: file.write_bytes(b"\7" * 5000),
    "is a Git LFS pointer": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "1 tensor missing": tensors(**{NORM: None}),
    "is [33], expected [32]": tensors(**{NORM: torch.ones(33)}),
    "has no use for": tensors(extra=torch.ones(3)),
    "NaN or infinity": tensors(**{NORM: torch.full((32,), torch.nan)}),
}


@pytest.mark.parametrize("command", ["train", "convert", "score", "eval"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_with_the_file_and_exit_status_2(good, tmp_path, command, fault):
    folder = shutil.copytree(good, tmp_path / "run")
    FAULTS[fault](folder / "model" / WEIGHTS)
    model = str(folder / "model")
    arguments = {
        "train": [str(folder / "run.yaml")],
        "convert": [model, str(tmp_path / "checkpoints")],
        "score": [model, str(folder / "answers.jsonl"), "--no-chat-template", *SCORE],
        "eval": [
            model,
            str(folder / "train.jsonl"),
            *OVERRIDES,
            *SCORE,
            "--output",
            str(tmp_path / "evaluation"),
        ],
    }[command]
    done = CliRunner().invoke(app, [command, *arguments])
    assert done.exit_code == 2, done.output
    line = done.output.strip().splitlines()[-1]
    assert line.startswith("error: ") and fault in line and str(folder / "model") in line
    assert "Traceback" not in done.output and not (tmp_path / "checkpoints" / "step_00000000").exists()

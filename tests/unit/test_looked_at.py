"""What a dry run, `plan` and `check` look at before a run: docs/configuration.md says it, and here each is shown a
fault of each kind."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click import unstyle
from helpers.two_problems import WORDS, save_model, settings, write_rows
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_laser.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
COMMANDS = {
    "dry run": ["train", "--dry-run", "--world-size", "1"],
    "plan": ["plan", "--gpus", "1", "--as-configured"],
    "check": ["check"],
}
CELLS = {"refuses": (2, True), "says": (0, True), "no": (0, False)}


class Run:
    """A run in which all is well, for a fault to be put in."""

    def __init__(self, folder, base):
        self.folder, self.base = folder, folder / "model"
        self.base.mkdir()
        for file in base.iterdir():
            (self.base / file.name).write_bytes(file.read_bytes())
        write_rows(folder)
        self.settings = settings(self.base)

    def rows(self, rows):
        write_rows(self.folder, rows)

    def set(self, **sections):
        for section, values in sections.items():
            self.settings.setdefault(section, {}).update(values)

    def shape(self, **values):
        file = self.base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    def weights(self, change):
        file = self.base / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def file(self, name, text):
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def told(self, command, more):
        """(exit status, what was printed, in one line) of a command on this run."""
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.settings))
        first, *options = COMMANDS[command]
        done = CliRunner().invoke(app, [first, str(file), *options, *more.get(command, ())])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, " ".join(unstyle(done.output).replace("│", " ").split())


def broken_run(run):
    run.folder.joinpath("run").mkdir()
    run.file("run/run.json", "{")


def more_tokens(run):
    """A tokenizer of more tokens than the model has rows for."""
    file = run.base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"token{place}": place for place in range(len(WORDS), 40)}
    file.write_text(json.dumps(content))


def small_machine(run):
    run.file("machine.yaml", "base: h100\nmemory_gib: 0.001\n")


def nan(tensors):
    tensors["model.norm.weight"][0] = float("nan")


def bigger(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].new_ones(7)


# row of the table: what is done to the run, a pattern that tells of it, and what single commands are given besides
FAULTS = {
    "settings: names, types, ranges, and whether they go together": (
        lambda run: run.set(rollout={"prompts_per_step": 0}),
        "rollout.prompts_per_step",
        {},
    ),
    "the model's shape (`config.json`)": (
        lambda run: (run.base / "config.json").unlink(),
        "has no config.json",
        {},
    ),
    "weight files: names, shapes and types, from their headers": (
        lambda run: run.weights(bigger),
        "model.norm.weight",
        {},
    ),
    "the numbers in weight files": (lambda run: run.weights(nan), "NaN|model.norm.weight", {}),
    "whether the longest sequence fits a micro-batch and the model's positions": (
        lambda run: run.set(rollout={"max_new_tokens": 500}, batching={"tokens_per_micro_batch": 1024}),
        "max_position_embeddings",
        {},
    ),
    "whether `parallel.tensor` and `parallel.pipeline` divide the model": (
        lambda run: run.set(parallel={"pipeline": 3}),
        "not divisible by parallel.pipeline 3",
        {"dry run": ["--world-size", "3"], "plan": ["--gpus", "3"]},
    ),
    "whether the number of processes goes into the layout": (
        lambda run: run.set(parallel={"tensor": 2}),
        "3 (GPUs|ranks|processes)[^;]*(not|multiple)|not divisible",
        {"dry run": ["--world-size", "3"], "plan": ["--gpus", "3"]},
    ),
    "memory of the fullest GPU": (
        small_machine,
        r"0\.001 GiB",
        {"dry run": ["--gpu-memory-gib", "0.001"], "plan": ["--gpu", "machine.yaml"]},
    ),
    "seconds of a step and of its phases": (lambda run: None, "phase seconds share bound by", {}),
    "whether the score token can be one": (
        lambda run: run.set(laser={"score_token": "<|none|>"}),
        r"'<\|none\|>' is not in the tokenizer",
        {},
    ),
    "`tokenizer.json`: that it can be read": (
        lambda run: (run.base / "tokenizer.json").write_text("{"),
        "tokenizer.json",
        {},
    ),
    "the tokenizer's size against the model's": (more_tokens, "tokens are beyond the model's vocabulary", {}),
    "the chat template": (
        lambda run: run.set(data={"apply_chat_template": True}),
        "tokenizer has no chat template",
        {},
    ),
    "data files: that they are there, their rows and columns": (
        lambda run: run.rows([{"question": "what is 1"}]),
        "no key 'problem'",
        {},
    ),
    "lengths of prompts, counted": (
        lambda run: run.set(data={"max_prompt_tokens": 3}),
        "are over data.max_prompt_tokens",
        {},
    ),
    "score tokens in the data": (
        lambda run: run.rows([{"problem": "what is <|score|>", "answer": "1"}]),
        "data.train: 1 prompts or answers",
        {},
    ),
    "the reward function: imported, its arguments, and a trial": (
        lambda run: run.set(reward={"function": run.file("reward.py", "import absent\n") + ":f"}),
        "No module named 'absent'",
        {},
    ),
    "the rollout function: imported, and its arguments": (
        lambda run: run.set(rollout={"function": run.file("tools.py", "import absent\n") + ":f"}),
        "No module named 'absent'",
        {},
    ),
    "`run.output_dir`: what would go on, change, or be refused": (broken_run, "run.json", {}),
    "whether the run may write into its folders": (
        lambda run: run.set(run={"output_dir": "/dev/null/run"}),
        "/dev/null is a file",
        {},
    ),
    "room on the disks": (lambda run: None, "disk space .* free; the run writes", {}),
    "how many steps `run.epochs` are": (
        lambda run: run.settings["run"].update(steps=None, epochs=3),
        "run.epochs 3 at 2 problems a step: 3 steps",
        {},
    ),
    "the environment that servers start in": (
        lambda run: run.set(
            rollout={"engine": "sglang", "sglang": {"python": str(run.folder / "no-python")}}
        ),
        "no-python is not a program",
        {"plan": ["--gpus", "2"]},
    ),
    "servers that run already: whether they answer": (
        lambda run: run.set(rollout={"engine": "sglang", "sglang": {"urls": ["http://127.0.0.1:9"]}}),
        "Connection refused|unreachable|does not answer",
        {"plan": ["--gpus", "2"]},
    ),
    "`logging.machine`": (
        lambda run: run.set(logging={"machine": "no-machine"}),
        "machine no-machine: no such machine",
        {},
    ),
    "whether this machine has the layers of `model.layers`": (lambda run: None, "model.layers is auto", {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("looked_at") / "model")


def table():
    """What the page says: {row: {command: cell}}."""
    section = PAGE.read_text().partition("## What is looked at before a run")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert rows[0] == ["What", "`train --dry-run`", "`plan`", "`check`"]
    return {name: dict(zip(COMMANDS, cells, strict=True)) for name, *cells in rows[2:]}


def test_every_row_of_the_table_has_a_fault_here():
    assert set(table()) == set(FAULTS)
    assert {cell for cells in table().values() for cell in cells.values()} == set(CELLS)


def test_a_run_in_which_all_is_well_passes_each(tmp_path, base):
    run = Run(tmp_path, base)
    for command in COMMANDS:
        status, said = run.told(command, {})
        assert status == 0, said


@pytest.mark.parametrize("row", FAULTS)
def test_each_command_looks_at_what_the_page_says_and_at_no_more(row, tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fault, pattern, more = FAULTS[row]
    run = Run(tmp_path, base)
    fault(run)
    for command, cell in table()[row].items():
        status, said = run.told(command, more)
        assert (status, bool(re.search(pattern, said))) == CELLS[cell], (command, cell, said)

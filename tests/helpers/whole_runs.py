"""Whole runs in this process: what a test does to them, and what is left of them to compare."""

from megatron_laser.config import load_config
from megatron_laser.loop import train
from megatron_laser.run.controller import Controller
from megatron_laser.trainer.checkpoint import folder as folders


def run(file, output, *overrides):
    return train(load_config(file, [f"run.output_dir={output}", *overrides]))


def checkpoint_digests(folder, step):
    """Of everything but what names the run and torch's random id."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    named = (".metadata", "manifest.json", "state.json")
    files = {name: digest for name, digest in folders.digests(path, "").items() if name not in named}
    state = folders.read_state(path)
    state["run"].pop("owner")
    return files | {"state": state}


def after_recording(monkeypatch, step, action):
    record = Controller.record

    def patched(self, number, *arguments):
        trouble = record(self, number, *arguments)
        if number == step:
            action()
        return trouble

    monkeypatch.setattr(Controller, "record", patched)


def before_recording(monkeypatch, step, action):
    record = Controller.record

    def patched(self, number, *arguments):
        if number == step:
            action()
        return record(self, number, *arguments)

    monkeypatch.setattr(Controller, "record", patched)

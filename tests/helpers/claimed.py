"""Runs as their folders see them: claimed, with as much of checkpoints and metrics as is compared there."""

import json
from dataclasses import asdict

import pytest

from helpers.runs import run_config
from megatron_laser.config import ConfigError
from megatron_laser.run.output_folder import claim_output_folder
from megatron_laser.trainer.checkpoint import folder as folders


def configurations(tmp_path):
    """name, *overrides -> the configuration of the run in that output folder of `tmp_path`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"problem": "1", "answer": "2"}\n')

    def build(name, *overrides):
        data = f"data.train={tmp_path / 'train.jsonl'}"
        steps = f"run.output_dir={tmp_path / name}", "run.steps=100"
        return run_config(tmp_path, tmp_path / "model", *steps, data, *overrides)

    return build


def save(config, step, owner):
    """As much of a checkpoint as the folders see."""
    partial = folders.partial_folder(folders.checkpoint_root(config), step)
    partial.mkdir(parents=True)
    (partial / "weights").write_text(f"of step {step}")
    state = {"step": step, "run": {"cursor": 4 * step, "owner": asdict(owner)}}
    return folders.publish(partial, state, folders.digests(partial, "weights"))


def start(config, *steps, **how):
    """Claim the folder and save checkpoints of `steps` and metrics up to the last one; what was claimed."""
    held = claim_output_folder(config, **how)
    for step in steps:
        save(config, step, held.owner)
    if steps:
        with (held.path / "metrics.jsonl").open("a") as file:
            file.writelines(f'{{"step": {step}}}\n' for step in range(1, steps[-1] + 1))
    held.release()
    return held


def refused(config, **how):
    with pytest.raises(ConfigError) as error:
        claim_output_folder(config, **how)
    return str(error.value)


def record(config):
    return json.loads((config.run.output_dir / "run.json").read_text())


def everything(folder):
    """Names, bytes and times of a folder's files, and of the files that they are."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def parent_run(of):
    """The configuration of a run with checkpoints of steps 20 and 40, whose rate was doubled after step 20."""
    start(of("parent"), 20)
    config = of("parent", "optimizer.lr=2.0e-6")
    held = claim_output_folder(config, change=True)
    save(config, 40, held.owner)
    held.release()
    (held.path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(46)) + '{"st')
    events = [
        {"step": 20, "kind": "checkpoint", "text": "saved"},
        {"step": 41, "kind": "stop", "text": "stopped"},
    ]
    (held.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return config

"""The YAML file of a run whose servers are fakes."""

from pathlib import Path

import yaml

from helpers.fake_sglang import fake_python


def write_run(folder: Path, **sglang) -> Path:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    settings = {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "train.jsonl"},
        "laser": {"enabled": False},
        "rollout": {
            "engine": "sglang",
            "sglang": {
                "device": "cpu",
                "python": fake_python(folder / "bin"),
                "start_deadline": 60,
                "hang_deadline": 15,  # a busy machine is no hang
                **sglang,
            },
        },
        "run": {"steps": 1, "output_dir": "out"},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file

"""Checkpoints of every parallel layout convert to a Hugging Face folder in one process."""

import pytest
import torch
from test_checkpoint_layouts import entry, prepared, run
from transformers import AutoModelForCausalLM

from megatron_laser.cli.conversion import convert
from megatron_laser.config import load_config
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = ["tensor 2, sequence, padded", "pipeline 2, virtual 2", "data 2, distributed"]


@pytest.mark.parametrize(
    "tied", [pytest.param(False, id="untied"), pytest.param(True, id="tied", marks=pytest.mark.long)]
)
def test_what_transformers_loads_equals_what_a_run_resumes_with(tmp_path, single_process, tied):
    folder = prepared(tmp_path, tied)
    run(folder, 2, [entry(name, save=name) for name in LAYOUTS])
    for name in LAYOUTS:
        config = load_config(folder / "config.yaml")
        root = folder / "checkpoints" / name
        settings = config.checkpoint.model_copy(update={"folder": root})
        trainer = Trainer(config, single_process, score_token_id=89)
        manager = CheckpointManager(
            config.model_copy(update={"checkpoint": settings}), single_process, trainer.policy
        )
        assert manager.resume()["step"] == 2
        target = convert(root / "step_00000002", folder / "hf" / name, model=folder)
        loaded = dict(AutoModelForCausalLM.from_pretrained(target, local_files_only=True).named_parameters())
        resumed = dict(trainer.weight_stream())
        assert loaded.keys() == resumed.keys()
        for key, tensor in resumed.items():
            assert torch.equal(loaded[key], tensor), (name, key)

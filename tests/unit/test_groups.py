"""Process groups of a layout end when another one begins: tools and tests try dozens in the same processes."""

import gc
import os

import torch.distributed as dist
from helpers.models import save_tiny_model
from helpers.runs import SCORE_TOKEN, run_config
from megatron.core import parallel_state

from megatron_laser.distributed import runtime
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer


def threads():
    gc.collect()
    return len(os.listdir("/proc/self/task"))


def test_no_thread_of_an_earlier_layout_is_left(single_process, tmp_path):
    save_tiny_model(tmp_path / "model", "qwen2")
    config = run_config(tmp_path, tmp_path / "model")
    own, counts = dist.new_group(backend="gloo"), []
    for _ in range(4):
        parallel_state.destroy_model_parallel()
        again = runtime.build_groups(config, dist.HashStore())
        trainer = Trainer(config, again, score_token_id=SCORE_TOKEN)
        CheckpointManager(config, again, trainer.policy)
        del trainer
        counts.append(threads())
    assert counts[1:] == [counts[0]] * 3
    dist.barrier(group=own)  # a group of somebody else is not the layout's


def test_no_thread_is_left_when_the_groups_are_left(tmp_path):
    runtime.stop()
    before = threads()
    save_tiny_model(tmp_path / "model", "qwen2")
    started = runtime.start(run_config(tmp_path, tmp_path / "model"))
    assert threads() > before + 10
    runtime.stop()
    del started
    assert threads() <= before + 3

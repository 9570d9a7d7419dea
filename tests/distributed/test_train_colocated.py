"""A whole run that shares its device with a real SGLang server: every hand-over happens, in order, and nothing drifts.

On a CPU the server gives nothing back (its memory saver is for GPUs), but answers every call; the trainer's state
really leaves and returns, and the weights go through shared memory.
"""

import json
import re

import pytest
import yaml
from helpers.ranks import train_on_ranks
from helpers.sglang_server import free_port, sglang_python
from helpers.tiny_run import write_tiny_run

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(700)]

STEP = [
    ("train", "servers gave back cuda_graph, kv_cache, weights"),
    ("train", "the trainer took"),
    ("sync", "servers gave back cuda_graph, kv_cache"),
    ("sync", "the trainer gave back"),
    ("sync", "servers hold weights"),
    ("generate", "the trainer gave back"),
    ("generate", "servers hold cuda_graph, kv_cache, weights"),
]
SAVE = [
    ("save", "servers gave back cuda_graph, kv_cache"),
    ("save", "the trainer took"),
    ("save", "servers hold weights"),
    ("generate", "the trainer gave back"),
    ("generate", "servers hold cuda_graph, kv_cache, weights"),
]
FIRST = [("sync", "servers gave back cuda_graph, kv_cache"), ("sync", "the trainer took"), *STEP[4:]]
EXPORT = FIRST


def test_two_ranks_and_a_server_take_turns(tmp_path):
    file = write_tiny_run(
        tmp_path / "run",
        rollout={
            "engine": "sglang",
            "weight_sync": "colocated",
            "sync_bucket_mib": 1,
            "verify_sync": True,
            "sglang": {
                "python": sglang_python(),
                "device": "cpu",
                "port": free_port(),
                "start_deadline": 280,
            },
        },
        optimizer={"lr": 1e-3, "distributed": True},
        checkpoint={"every": 2, "export_hf": True},
        run={"steps": 3},
        logging={"tensorboard": False, "level": "INFO"},
        laser={"score_source": "server"},
        policy={"old_logprobs": "on_policy"},
    )
    output = train_on_ranks(file, processes=2, timeout=600)
    folder = tmp_path / "run" / yaml.safe_load(file.read_text())["run"]["output_dir"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "policy_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["logprob_diff_max"] < 1e-4  # the server samples from the weights that are trained
        assert line["staleness_max"] == 0
        assert line["time/turns"] > 0
    differences = [line["zc_logprob_diff_max"] for line in steps if line["scored_fraction"]]
    assert differences and max(differences) < 1e-4
    said = re.findall(r"colocated, phase (\w+): (.*?); [\d.]+ GiB free", output)
    expected = [*FIRST, *STEP, *STEP, *SAVE, *STEP, *SAVE, *EXPORT]
    said = [phase for phase in said if phase[0] != "servers start"]
    assert len(said) == len(expected), said
    for (phase, text), (wanted, begins) in zip(said, expected):
        assert phase == wanted and text.startswith(begins), (said, expected)

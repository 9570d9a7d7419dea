"""The trainer's form of SGLang's checksum on GPUs, against its own kernel, interpreted on the CPU."""

import json
import os
import subprocess

import pytest
import torch
from helpers.sglang_server import sglang_python

from megatron_laser.weight_sync.hashes import TileSums

pytestmark = pytest.mark.sglang

COUNTS = (0, 1, 7, 4096, 16385, 50001)  # of bf16 values: odd ones end within a word

SCRIPT = """\
import importlib.util, json, sys, torch
(package,) = importlib.util.find_spec("sglang").submodule_search_locations
file = f"{package}/kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("gpu_tensor_hash", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class OnGpu(torch.Tensor):
    is_cuda = True  # asked for by the function, not by the interpreted kernel

def values(count):
    return (torch.arange(count) * 40503).to(torch.int16).view(torch.bfloat16).as_subclass(OnGpu)

print(json.dumps([f"{module.gpu_tensor_hash(values(int(count))):016x}" for count in sys.argv[1:]]))
"""


def ours(count):
    total = TileSums()
    for piece in (torch.arange(count) * 40503).to(torch.int16).view(torch.bfloat16).split(1237):
        total.add(piece)
    return total.hexdigest()


def test_sums_are_those_of_sglangs_kernel():
    done = subprocess.run(
        [sglang_python(), "-c", SCRIPT, *map(str, COUNTS)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [ours(count) for count in COUNTS] == json.loads(done.stdout)

"""Where FP8 weights go in SGLang: its own model classes, loader and quantization, on a CPU and without a server.

What is not run: a product with them, which takes a GPU. SGLang's switch to the packing of AMX is turned off, so that
what is done after loading is what is done on Ada and Hopper.
"""

import json
import os
import subprocess

import pytest
import torch
from helpers.sglang_server import sglang_python
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_laser.config.model_folder.quantized import BLOCK_CONFIG
from megatron_laser.rollout.servers.command import FP8_OPTIONS
from megatron_laser.weight_sync.checksums import ServerLayout, StreamDigest
from megatron_laser.weight_sync.fp8 import as_served

pytestmark = pytest.mark.sglang

SCRIPT = """\
import hashlib, json, socket, sys, torch
folder, overrides, *updates = sys.argv[1:]
import sglang.srt.layers.quantization.fp8 as fp8
from sglang.srt import runtime_context
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.server_args import ServerArgs
from safetensors.torch import load_file

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
arguments = ServerArgs(
    model_path=folder, device="cpu", dtype="bfloat16", quantization="fp8", json_model_override_args=overrides,
    attention_backend="torch_native", sampling_backend="pytorch", grammar_backend="none",
)
ranks = runtime_context.SpawnRanks(world_rank=0, dp_rank=0, gpu_id=0)
runtime_context.publish(arguments, role="scheduler", ranks=ranks)
parallel_state.init_distributed_environment(
    backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"tcp://127.0.0.1:{port}"
)
parallel_state.initialize_model_parallel(backend="gloo")
fp8._is_cpu = False
device = torch.device("cpu")
configuration = ModelConfig.from_server_args(arguments)
model = DefaultModelLoader(LoadConfig()).load_model(
    model_config=configuration, device_config=DeviceConfig("cpu")
)
for update in updates:  # as a weight-update session: begin, load, end
    DefaultModelLoader.restore_weights_before_loading(model, device)
    model.load_weights(load_file(update).items())
    DefaultModelLoader.postprocess_weights(model, device)

def digest(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).digest()[:8].hex()

held = {name: [str(p.dtype), list(p.shape), digest(p.data)] for name, p in model.named_parameters()}
print("HELD", json.dumps(held))
"""

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS = {
    "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)
    ),
}


def run(folder, overrides, *updates):
    return subprocess.run(
        [sglang_python(), "-c", SCRIPT, str(folder), overrides, *map(str, updates)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ
        | {
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )


def save(kind, folder, seed):
    torch.manual_seed(seed)
    MODELS[kind]().to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.long), "experts"])
def test_sglang_holds_what_the_trainer_sends_after_every_update(kind, tmp_path):
    """From a folder of plain weights, as a server starts, and through two updates; every parameter by checksum."""
    save(kind, tmp_path / "model", 0)
    updates = []
    for seed in (1, 2):
        weights = save(kind, tmp_path / f"trained_{seed}", seed)
        digest = StreamDigest(on_cpu=True, layout=ServerLayout(heads=4))
        # An export brings query, key and value in this order; a folder's file is sorted by name.
        order = sorted(weights.items(), key=lambda item: ".k_proj" in item[0] or ".v_proj" in item[0])
        stream = digest.watch(as_served(order, dtype=torch.bfloat16, quantized=True))
        updates.append(tmp_path / f"update_{seed}.safetensors")
        save_file(dict(stream), updates[-1])
    done = run(tmp_path / "model", FP8_OPTIONS["json-model-override-args"], *updates)
    assert done.returncode == 0, done.stderr[-3000:]
    held = json.loads(done.stdout.split("HELD ")[1])
    assert {name: found[2] for name, found in held.items()} == digest.sums()  # of the last one
    attention = "model.layers.1.self_attn."
    assert held[f"{attention}qkv_proj.weight"][:2] == ["torch.float8_e4m3fn", [512, 256]]
    assert held[f"{attention}qkv_proj.weight_scale_inv"][:2] == ["torch.float32", [4, 2]]
    plain = [name for name, found in held.items() if found[0] == "torch.bfloat16"]
    assert all("norm" in name or name.split(".")[-2] in ("embed_tokens", "lm_head", "gate") for name in plain)


@pytest.mark.long
def test_sglangs_own_quantization_takes_weights_once(tmp_path):
    """The reason why the trainer quantizes."""
    save("dense", tmp_path / "model", 0)
    started = run(tmp_path / "model", "{}")
    assert started.returncode == 0, started.stderr[-3000:]
    held = json.loads(started.stdout.split("HELD ")[1])
    down = "model.layers.0.mlp.down_proj.weight"
    assert held[down][:2] == ["torch.float8_e4m3fn", [384, 256]]  # transposed
    updated = run(tmp_path / "model", "{}", tmp_path / "model" / "model.safetensors")
    assert updated.returncode != 0 and "Attempted to load weight" in updated.stderr


def test_the_configuration_is_that_of_folders_with_fp8_weights():
    assert json.loads(FP8_OPTIONS["json-model-override-args"])["quantization_config"] == BLOCK_CONFIG

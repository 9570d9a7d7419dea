"""The dry run's sum for a rank on a CPU: what torch's layers keep, and which lines there are."""

import math

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.model import platform

platform.install()

from megatron_laser.benchmarks.random_rollouts import random_rollouts  # noqa: E402
from megatron_laser.config import resolve_plan  # noqa: E402
from megatron_laser.config.model_folder.architecture import read_architecture  # noqa: E402
from megatron_laser.config.model_folder.parameters import Layout, tensor_shapes  # noqa: E402
from megatron_laser.config.plan.cpu import layer_bytes  # noqa: E402
from megatron_laser.config.plan.lines import STEP  # noqa: E402
from megatron_laser.config.plan.resolve import resolve_rank_memory  # noqa: E402
from megatron_laser.distributed import runtime as runtimes  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

CASES = {
    "qwen2": [],
    "qwen2, shared": ["batching.share_prompts=true"],
    "qwen2, bfloat16": ["model.dtype=bfloat16"],
    "qwen3": [],
    "qwen3, shared": ["batching.share_prompts=true"],
    "qwen3, bfloat16": ["model.dtype=bfloat16"],
    "qwen3-moe": [],
    "qwen2, full": ["model.recompute=full"],
    "qwen2, mlp": ["model.recompute=[mlp]"],
    "qwen2, core_attn": ["model.recompute=[core_attn]"],
    "qwen3-moe, mlp": ["model.recompute=[mlp]"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in {name.partition(",")[0] for name in CASES}:
        save_tiny_model(folder / family, family)
    return folder


@pytest.fixture
def config_of(tmp_path, models):
    def make(family, *overrides):
        more = ["laser.enabled=false", "model.layers=torch", "batching.tokens_per_micro_batch=1024"]
        more += ["data.max_prompt_tokens=32", "rollout.max_new_tokens=32", "batching.share_prompts=false"]
        return run_config(tmp_path, models / family, *more, *overrides)

    yield make
    runtimes.stop()


def kept_by_a_layer(trainer, flat):
    """Bytes of the storages that a layer in the middle saves for its backward, but for weights and what it has in
    common with the layer before it."""
    model = trainer.policy.chunks.models[0]
    layer = model.decoder.layers[2]
    of_all = {one.untyped_storage().data_ptr() for one in model.parameters()}
    found = [{}, {}]

    def saving(storages, forward):
        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)

            def pack(tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = (tensor, storage.nbytes())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*args, **kwargs)

        return run

    for storages, one in zip(found, (model.decoder.layers[1], layer), strict=True):
        one.forward = saving(storages, one.forward)
    trainer.train_step(flat, 1)
    before, own = found
    common = of_all | set(before)  # rotary tables, indexes
    return sum(nbytes for place, (_, nbytes) in own.items() if place not in common)


@pytest.mark.parametrize("case", CASES)
def test_a_layers_bytes_are_the_storages_that_autograd_keeps(case, config_of):
    family = case.partition(",")[0]
    config = config_of(family, *CASES[case])
    trainer = Trainer(config, runtimes.start(config), score_token_id=None)
    flat = random_rollouts(prompts=4, samples=4, prompt=32, response=32, ids=(3, 250), eos=1)
    (batch,) = trainer.prepare(flat).micro_batches
    architecture = read_architecture(config.model.path)
    kept, anew = layer_bytes(
        config, architecture, Layout(), tokens=batch.tokens.shape[1], recompute=config.model.recompute
    )
    measured = kept_by_a_layer(trainer, flat)
    if config.model.recompute == "full":  # seen in the backward, when the layer is run again
        kept += anew
    assert measured == pytest.approx(kept, rel=0.01), (measured - kept) / batch.tokens.shape[1]


def test_on_a_cpu_there_is_nothing_of_a_gpu_and_the_default_is_a_gpu(config_of):
    config = config_of("qwen2", "rollout.engine=in_process")
    there = {line.name for line in resolve_plan(config, 1).memory.lines}
    on_cpu = {line.name for line in resolve_plan(config, 1, device="cpu").memory.lines}
    of_a_gpu = {"CUDA context, cuBLAS, cuDNN", "allocator"}
    assert "CUDA context, cuBLAS, cuDNN" in there and not on_cpu & of_a_gpu
    assert {"weights", "gradients", "optimizer", "activations", "log-prob head"} <= there & on_cpu
    assert resolve_plan(config, 1).memory == resolve_plan(config, 1, device="cuda").memory


def test_the_sum_of_a_stage_is_its_own_and_the_plans_is_the_fullest(config_of):
    config = config_of("qwen2", "parallel.pipeline=2")
    first, last = resolve_rank_memory(config, 2, device="cpu")
    names = [{line.name for line in one.lines} for one in (first, last)]
    assert "log-prob head" in names[1] - names[0]
    assert resolve_plan(config, 2, device="cpu").memory.total == max(first.total, last.total)
    # By hand: 16 responses and prompts of 64 tokens are one micro-batch, so one is in flight on either stage; of the
    # first 2 layers, and what is sent to the second.
    kept, _ = layer_bytes(
        config, read_architecture(config.model.path), Layout(tensor=1), tokens=1024, recompute="none"
    )
    activations = next(line.bytes for line in first.lines if line.name == "activations")
    assert activations == 2 * kept + 4 * 1024 * 64


def test_what_is_sent_at_once_is_a_bucket_and_a_vocabulary_of_two_stages_has_its_own(config_of):
    overrides = ("parallel.pipeline=2", "optimizer.distributed=true", "model.vocab_multiple=16")
    config = config_of("qwen3", *overrides)
    assert config.model.dtype == "float32"
    first, last = resolve_rank_memory(config, 4, device="cpu")
    arch = read_architecture(config.model.path)
    of_a_layer = [shape for name, shape in tensor_shapes(arch).items() if name.startswith("model.layers.0.")]
    table = 4 * -(-arch.vocab_size // 16) * 16 * arch.hidden_size
    for one, norm in ((first, 0), (last, 4 * arch.hidden_size)):
        weights = sum(line.bytes for line in one.lines if line.name == "weights")
        layers = 2 * 4 * sum(map(math.prod, of_a_layer)) + norm
        assert weights == layers + table
        # Two ranks share the optimizer: of half a bucket a root and a quotient, or gloo's copy of a whole one.
        assert sum(line.bytes for line in one.lines if line.phase == STEP) == max(table, layers)

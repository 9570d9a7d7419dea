"""Settings that save memory: what is refused, what the plan counts, and that they change only what they should."""

import gc
import weakref

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.config.plan.resolve import resolve_plan
from megatron_laser.model import platform

platform.install()

from megatron_laser.model import activation_offload, host_memory, machine  # noqa: E402
from megatron_laser.trainer.checkpoint import sharded_state  # noqa: E402
from megatron_laser.trainer.checkpoint.manager import CheckpointManager  # noqa: E402
from megatron_laser.trainer.offload import Part  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

R, W = Response(5, True), Response(7, False)
GROUPS = [[R, W, W], [W, R, R], [R, W, R], [W, W, R]]
BF16 = "model.dtype=bfloat16"
GIB = 2**30


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    for family in ("qwen2", "qwen3-moe", "qwen3-moe-even"):
        save_tiny_model(root / family, family)
    return root


def config_of(tmp_path, folders, *overrides, family="qwen2"):
    return run_config(
        tmp_path,
        folders / family,
        *overrides,
        laser={"enabled": False},
        rollout={"samples_per_prompt": 3},
        policy={"minibatches": 2},
    )


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        (
            "qwen2",
            ["model.recompute_layers=2"],
            "model.recompute_layers: 2 counts layers that are recomputed whole",
        ),
        (
            "qwen2",
            ["model.offload_activations=true"],
            "with model.recompute none layers keep more than these",
        ),
        (
            "qwen2",
            ["model.offload_activations=true", "model.recompute=full", "model.recompute_layers=2"],
            "with model.recompute full of 2 layers layers keep more",
        ),
        ("qwen2", ["model.recompute=[mlp, layernorm]"], "layernorm is for models with experts"),
        ("qwen2", ["model.recompute=moe_act"], "moe_act is for models with experts"),
        (
            "qwen3-moe",
            ["model.recompute=moe_act", "model.layers=torch"],
            "moe_act can be recomputed in Transformer",
        ),
        (
            "qwen2",
            ["optimizer.moments_dtype=bfloat16", "optimizer.distributed=true"],
            "optimizer.moments_dtype: bfloat16 with model.dtype float32: a run in float32 keeps",
        ),
        (
            "qwen2",
            ["optimizer.gradient_dtype=bfloat16"],
            "optimizer.gradient_dtype: bfloat16 with model.dtype float32",
        ),
        ("qwen2", [BF16, "optimizer.moments_dtype=bfloat16"], "needs optimizer.distributed: true"),
        (
            "qwen2",
            [BF16, "optimizer.moments_dtype=bfloat16", "optimizer.distributed=true", "model.layers=torch"],
            "is for Transformer Engine's optimizer, and model.layers is torch",
        ),
        ("qwen2", ["model.fp8=blockwise"], "model.fp8: blockwise with model.dtype float32"),
        ("qwen2", [BF16, "model.fp8=blockwise", "model.layers=torch"], "is for Transformer Engine's layers"),
        ("qwen2", [BF16, "model.fp8=tensorwise", "batching.pad_multiple=24"], "so the multiple one of 16"),
        (
            "qwen3-moe",
            [BF16, "model.fp8=blockwise"],
            "an expert's intermediate size 24 / 1 = 24 on a rank, not a",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, folders, family, settings, said):
    with pytest.raises(ConfigError) as error:
        resolve_plan(config_of(tmp_path, folders, *settings, family=family))
    (problem,) = error.value.problems
    assert said in problem


@pytest.mark.parametrize("value", ["delayed", "true"])
def test_fp8_has_recipes_without_a_memory_of_their_own(tmp_path, folders, value):
    with pytest.raises(ConfigError, match=r"model\.fp8: expected 'none', 'blockwise' or 'tensorwise'"):
        config_of(tmp_path, folders, f"model.fp8={value}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([BF16, "model.fp8=blockwise"], "model.fp8: blockwise needs Transformer Engine's layers"),
        (
            [BF16, "optimizer.moments_dtype=bfloat16", "optimizer.distributed=true"],
            "for Transformer Engine's optimizer",
        ),
        (["model.recompute=layernorm"], "layernorm can be recomputed in Transformer Engine's layers only"),
    ],
)
def test_what_a_machine_cannot_do_is_said_before_weights_are_read(
    tmp_path, folders, single_process, monkeypatch, settings, said
):
    from megatron_laser.trainer import policy

    monkeypatch.setattr(policy, "load_weights", None)  # would be another error
    with pytest.raises(ConfigError, match=said):
        Trainer(
            config_of(tmp_path, folders, *settings, family="qwen3-moe-even"),
            single_process,
            score_token_id=None,
        )


def test_without_page_locked_memory_the_reason_and_the_setting_are_said(tmp_path, folders, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")

    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(machine, "use_transformer_engine", lambda layers: True)
    monkeypatch.setattr(host_memory.torch, "empty", refuse)
    config = config_of(
        tmp_path,
        folders,
        "optimizer.offload=true",
        "model.recompute=full",
        "model.offload_activations=true",
    )
    problems = machine.memory_setting_problems(config)
    assert [problem.split(" needs ")[0] for problem in problems] == [
        "model.offload_activations: true",
        "optimizer.offload: true",
    ]
    assert all("memlock" in problem and "OS call failed" in problem for problem in problems)


def test_a_node_with_too_little_host_memory_is_found_by_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)  # no limit
    available = machine.available_host_bytes()
    assert available is not None and available > 0
    (tmp_path / "memory.max").write_text(str(8 * GIB))
    (tmp_path / "memory.current").write_text(str(8 * GIB - 2**20))
    (tmp_path / "memory.stat").write_text("anon 5\nactive_file 4096\ninactive_file 8192\n")
    assert machine.available_host_bytes() == 2**20 + 4096 + 8192
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 100 * GIB)
    assert machine.host_memory_problems(25 * GIB, 4, "optimizer.offload: true") == []
    (problem,) = machine.host_memory_problems(26 * GIB, 4, "optimizer.offload: true")
    assert "each rank needs 26.00 GiB" in problem and "4 of them on this node 104.00 GiB" in problem


def lines(tmp_path, folders, *overrides, family="qwen2", ranks=1):
    memory = resolve_plan(config_of(tmp_path, folders, *overrides, family=family), ranks).memory
    return {(line.name, line.phase): line for line in memory.lines}, memory


def test_the_plan_counts_what_each_setting_moves_or_halves(tmp_path, folders):
    base, _ = lines(tmp_path, folders, BF16, "optimizer.distributed=true")
    weights, state = base["weights", "state"].bytes, base["optimizer", "state"].bytes
    assert state == 6 * weights
    settings = (BF16, "optimizer.distributed=true", "optimizer.offload=true")
    away, memory = lines(tmp_path, folders, *settings)
    assert ("optimizer", "state") not in away
    assert away["optimizer", "optimizer step"].bytes == away["save: optimizer", "save"].bytes == state
    assert memory.host == away["optimizer", "host"].bytes == state
    small, _ = lines(
        tmp_path,
        folders,
        *settings[:2],
        "optimizer.moments_dtype=bfloat16",
        "optimizer.gradient_dtype=bfloat16",
    )
    assert small["optimizer", "state"].bytes == 4 * weights  # float32 weights and two moments
    assert 2 * small["gradients", "state"].bytes == base["gradients", "state"].bytes
    rounded, _ = lines(tmp_path, folders, BF16, "optimizer.gradient_dtype=bfloat16")
    assert rounded["gradients in float32", "optimizer step"].bytes == 2 * weights
    fp8, _ = lines(tmp_path, folders, BF16, "model.fp8=blockwise")
    tables = 2 * 256 * 64 * 2  # embedding and head, padded, in bytes of bfloat16
    assert weights - tables - 2000 < fp8["weights in FP8", "state"].bytes < weights - tables


def test_the_plan_counts_layers_that_are_recomputed(tmp_path, folders):
    def activations(*settings):
        found, memory = lines(tmp_path, folders, *(f"model.{setting}" for setting in settings))
        return found["activations", "update"].bytes, memory

    full, nothing = activations("recompute=full")[0], activations()[0]
    half = activations("recompute=full", "recompute_layers=2")[0]
    assert half == (full + nothing) // 2
    assert full < activations("recompute=mlp")[0] < nothing
    moved, memory = activations("recompute=full", "offload_activations=true")
    assert moved == full // 2  # two of four layers' inputs are on the GPU
    assert memory.host == 4 * activation_offload.PIECE  # each in pieces of one size
    whole, pipeline = "recompute=full", ("parallel.pipeline=2", "batching.tokens_per_micro_batch=128")
    stage = lines(tmp_path, folders, *pipeline, f"model.{whole}", "model.offload_activations=true", ranks=2)[
        0
    ]
    plain = lines(tmp_path, folders, *pipeline, f"model.{whole}", ranks=2)[0]
    kept = plain["activations", "update"].bytes // 2  # of each of two layers: the last stage is the fullest
    # and what the schedule has of the micro-batch: the stage's input and its output
    assert stage["activations", "update"].bytes == (2 + 2) * kept
    layout = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "batching.tokens_per_micro_batch=128")
    chunks = lines(tmp_path, folders, *layout, "model.recompute=full", "model.recompute_layers=1", ranks=2)[0]
    whole = lines(tmp_path, folders, *layout, "model.recompute=full", ranks=2)[0]
    assert chunks["activations", "update"].bytes == whole["activations", "update"].bytes  # one layer a chunk


def train(trainer, step):
    return trainer.train_step(rollout_batch(GROUPS, seed=step), step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", ["true", "false"])
def test_an_optimizer_in_host_memory_learns_the_same_bit_for_bit(
    tmp_path, folders, single_process, dtype, distributed
):
    settings = f"model.dtype={dtype}", f"optimizer.distributed={distributed}", "optimizer.lr=1e-3"

    def trainer(name, *more):
        config = config_of(tmp_path, folders, *settings, f"run.output_dir={tmp_path / name}", *more)
        return config, Trainer(config, single_process, score_token_id=None)

    _, plain = trainer("plain")
    config, moving = trainer("moving", "optimizer.offload=true")
    manager = CheckpointManager(config, single_process, moving.policy)
    for step in (1, 2, 3):
        assert train(plain, step).metrics == train(moving, step).metrics
        assert Part.OPTIMIZER not in moving.policy.memory.on_device
        if step == 2:
            manager.save(2, {"cursor": None})
            assert manager.wait()
            assert Part.OPTIMIZER not in moving.policy.memory.on_device
    _, resumed = trainer("moving", "optimizer.offload=true")
    assert CheckpointManager(config, single_process, resumed.policy).resume()["step"] == 2
    train(resumed, 3)
    expected = sharded_state.build_state(plain.policy)
    for other in (moving, resumed):
        found = sharded_state.build_state(other.policy)
        assert Part.OPTIMIZER not in other.policy.memory.on_device
        assert found.keys() == expected.keys()
        for name, entry in expected.items():
            assert torch.equal(found[name].data, entry.data), (other is resumed, name)


def test_gradients_in_bfloat16_are_float32_ones_rounded(tmp_path, folders, single_process):
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(
            tmp_path, folders, BF16, f"optimizer.gradient_dtype={dtype}", "optimizer.grad_clip=0"
        )
        trainer = Trainer(config, single_process, score_token_id=None)
        train(trainer, 1)
        (wrapped,) = trainer.policy.chunks.wrapped
        (buffer,) = wrapped.buffers
        assert buffer.grad_data.dtype == getattr(torch, dtype)
        gradients[dtype] = buffer.grad_data.float()
    exact, rounded = gradients.values()
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).norm() / exact.norm()) < 2**-8


@pytest.mark.parametrize("moves", [True, False])
def test_inputs_of_layers_are_gone_between_forward_and_backward(
    tmp_path, folders, single_process, monkeypatch, moves
):
    """What autograd keeps in their place is host memory."""
    seen, moved = [], []
    pack = activation_offload._Pass.pack

    def watch(self, tensor):
        kept = pack(self, tensor)
        if not isinstance(kept, torch.Tensor):
            seen.append(weakref.ref(tensor))
            moved.append(sum(piece.numel() for piece in kept.host))
        return kept if moves else tensor

    monkeypatch.setattr(activation_offload._Pass, "pack", watch)
    settings = "model.recompute=full", "model.offload_activations=true"
    trainer = Trainer(config_of(tmp_path, folders, *settings), single_process, score_token_id=None)
    model = trainer.policy.chunks.models[0]
    packed = trainer.prepare(rollout_batch(GROUPS, seed=1)).micro_batches[0].packed
    hidden = torch.randn(int(packed.cu_seqlens_q[-1]), 1, 64, requires_grad=True)
    angles = model.rotary_pos_emb(256)
    output = model.decoder(hidden * 1, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed)
    gc.collect()
    assert len(seen) >= 5  # of four layers and of the last norm
    assert all((reference() is None) == moves for reference in seen)
    assert set(moved) == {activation_offload.PIECE}
    output.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.abs().sum() > 0)

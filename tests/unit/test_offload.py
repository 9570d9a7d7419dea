"""The trainer's state leaves the device and returns: bit for bit, in place, and without changing what is learned."""

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import run_config, state_of

from megatron_laser.model import platform

platform.install()

from megatron_laser.model.host_memory import host_pieces  # noqa: E402
from megatron_laser.trainer.checkpoint import sharded_state  # noqa: E402
from megatron_laser.trainer.offload import ALL_PARTS, Part  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

R, W = Response(5, True), Response(7, False)
GROUPS = [[R, W, W], [W, R, R], [R, W, R], [W, W, R]]
KINDS = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{', distributed' if kind[1] else ''}")
def trainer_of(request, single_process, model_folder, tmp_path):
    dtype, distributed = request.param

    def make(**policy):
        config = run_config(
            tmp_path,
            model_folder,
            f"model.dtype={dtype}",
            laser={"enabled": False},
            optimizer={"lr": 1e-3, "distributed": distributed},
            policy={"minibatches": 2, "old_logprobs": "recompute", **policy},
            rollout={"samples_per_prompt": 3},
        )
        return Trainer(config, single_process, score_token_id=None)

    return make


def train(trainer, step):
    return trainer.train_step(rollout_batch(GROUPS, seed=step), step)


def test_a_round_trip_leaves_every_bit_and_every_view_as_it_was(trainer_of):
    trainer = trainer_of()
    train(trainer, 1)
    tensors = state_of(trainer)
    assert len(tensors) > 3 * sum(1 for _ in trainer.policy.chunks.models[0].parameters())
    before = [tensor.detach().clone() for tensor in tensors]
    state = trainer.policy.memory
    freed = state.offload(ALL_PARTS)
    assert state.on_device == frozenset()
    # counts of steps are numbers, and stay
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors if tensor.dim())
    weights = sum(p.numel() for p in trainer.policy.chunks.models[0].parameters())
    # fp32 gradients and both moments, and the weights themselves
    assert freed >= weights * (4 + 8 + 4 if before[0].dtype is torch.float32 else 4 + 8 + 4 + 2)
    assert state.onload(ALL_PARTS) == freed
    assert state.on_device == ALL_PARTS
    after = state_of(trainer)
    assert all(one is other for one, other in zip(tensors, after, strict=True))
    for tensor, values in zip(after, before, strict=True):
        assert torch.equal(tensor.detach(), values)
    (wrapped,) = trainer.policy.chunks.wrapped
    for buffer in wrapped.buffers:
        assert not buffer.grad_data.any()
        for parameter in buffer.params:
            assert parameter.main_grad.untyped_storage()._cdata == buffer.grad_data.untyped_storage()._cdata
            if buffer.param_data is not None:
                assert parameter.untyped_storage()._cdata == buffer.param_data.untyped_storage()._cdata


def test_training_with_turns_equals_training_without(trainer_of):
    plain, moving = trainer_of(), trainer_of()
    state = moving.policy.memory
    state.offload(ALL_PARTS)
    for step in (1, 2, 3):
        state.onload(ALL_PARTS)
        expected, result = train(plain, step), train(moving, step)
        assert result.metrics == expected.metrics
        state.offload(ALL_PARTS - {Part.PARAMETERS})
        for (name, tensor), (other, same) in zip(plain.weight_stream(), moving.weight_stream(), strict=True):
            assert name == other and torch.equal(tensor, same), (step, name)
        state.offload({Part.PARAMETERS})
    state.onload(ALL_PARTS)
    for tensor, same in zip(state_of(plain), state_of(moving), strict=True):
        assert torch.equal(tensor.detach(), same.detach())


def test_a_checkpoint_needs_weights_and_optimizer_only(trainer_of):
    trainer = trainer_of()
    train(trainer, 1)
    expected = {name: entry.data.clone() for name, entry in sharded_state.build_state(trainer.policy).items()}
    state = trainer.policy.memory
    state.offload(ALL_PARTS)
    state.onload({Part.PARAMETERS, Part.OPTIMIZER})
    assert state.on_device == {Part.PARAMETERS, Part.OPTIMIZER}
    found = sharded_state.build_state(trainer.policy)
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        assert torch.equal(entry.data, expected[name]), name


def test_the_optimizers_leaving_does_not_touch_the_weights(trainer_of):
    trainer = trainer_of()
    train(trainer, 1)
    before = {name: tensor.clone() for name, tensor in trainer.weight_stream()}
    state = trainer.policy.memory
    state.offload({Part.OPTIMIZER, Part.GRADIENTS})
    for name, tensor in trainer.weight_stream():
        assert torch.equal(tensor, before[name])
    assert state.offload({Part.OPTIMIZER}) == 0  # away already
    assert state.onload({Part.PARAMETERS}) == 0  # there already


def test_host_memory_is_taken_once(trainer_of):
    trainer = trainer_of()
    train(trainer, 1)
    state = trainer.policy.memory
    copies = []
    for _ in range(3):
        state.offload(ALL_PARTS)
        parked = [item for items in state._parked.values() for item in items]
        copies.append([piece.data_ptr() for item in parked if item.host is not None for piece in item.host])
        assert all(item.host is None for item in state._parked[Part.GRADIENTS])
        state.onload(ALL_PARTS)
    assert copies[0] and copies[0] == copies[1] == copies[2]


def test_a_reference_model_leaves_too(trainer_of):
    trainer = trainer_of(kl_coefficient=0.1)
    assert trainer.reference is not None
    state = trainer.policy.memory
    parameters = list(trainer.reference.models[0].parameters())
    before = [parameter.clone() for parameter in parameters]
    state.offload({Part.REFERENCE})
    assert all(parameter.untyped_storage().nbytes() == 0 for parameter in parameters)
    state.onload({Part.REFERENCE})
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before))
    train(trainer, 1)


@pytest.mark.parametrize("nbytes", [1, 2**20, 2**20 + 1, 3 * 2**30 + 5 * 2**20 + 7, 28 * 2**30])
def test_pinned_buffers_are_of_sizes_that_torch_does_not_round_up(nbytes):
    sizes = host_pieces(nbytes)
    assert nbytes <= sum(sizes) < nbytes + 2**20
    assert all(size & (size - 1) == 0 for size in sizes) and sizes == sorted(sizes, reverse=True)

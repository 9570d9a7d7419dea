"""What a save takes: on the device little more than a buffer, in host memory the rank's share of the state."""

import weakref

import pytest
import torch
from helpers.models import save_tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laser.model import platform
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.checkpoint import sharded_state, torch_dist
from megatron_laser.trainer.checkpoint.manager import CheckpointManager
from megatron_laser.trainer.trainer import Trainer

GROUPS = [[Response(9, True), Response(12, False)], [Response(7, False), Response(3, True)]]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations made, as they would lie on a GPU.

    A storage is in host memory if `on_host` was told so, or if it was made of tensors in host memory alone.
    """

    def __init__(self):
        super().__init__()
        self.live = {"host": 0, "device": 0}
        self.peak = {"host": 0, "device": 0}
        self._where = {}

    def on_host(self, tensor):
        key = tensor.untyped_storage()._cdata
        self._count("device", -self._where[key][1])
        self._where[key] = ("host", self._where[key][1])
        self._count("host", self._where[key][1])
        return tensor

    def _count(self, where, nbytes):
        self.live[where] += nbytes
        self.peak[where] = max(self.peak[where], self.live[where])

    def _forget(self, key):
        where, nbytes = self._where.pop(key)
        self._count(where, -nbytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        inputs = [x.untyped_storage()._cdata for x in flat if isinstance(x, torch.Tensor)]
        known = [self._where.get(key, ("device", 0))[0] for key in inputs]
        host = bool(known) and all(where == "host" for where in known)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in inputs or key in self._where:
                continue
            self._where[key] = ("host" if host else "device", storage.nbytes())
            self._count(*self._where[key])
            weakref.finalize(storage, self._forget, key)
        return result


@pytest.fixture
def trainer(single_process, tmp_path):
    """A bf16 policy under the distributed optimizer whose largest parameter is 1/12 of it, after one step."""
    save_tiny_model(tmp_path / "model", "qwen2", hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    config = run_config(
        tmp_path,
        tmp_path / "model",
        "model.dtype=bfloat16",
        "optimizer.distributed=true",
        "checkpoint.every=1",
    )
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    trainer.train_step(rollout_batch(GROUPS, seed=1), 1)
    trainer.checkpoints = CheckpointManager(config, single_process, trainer.policy)
    return trainer


def gathering(monkeypatch):
    """Gather over a group of one, too: the operations of every rank of a larger group."""
    places = optimizer_state.places

    def shared(optimizer):
        groups = {id(parameter): group for parameter, _, group in optimizer_state._parameters(optimizer)}
        return {
            key: optimizer_state.Place(place.slot, groups[key]) for key, place in places(optimizer).items()
        }

    monkeypatch.setattr(optimizer_state, "places", shared)


def test_a_save_needs_at_most_two_bytes_a_parameter_on_the_device(trainer, monkeypatch):
    parameters = sum(p.numel() for model in trainer.policy.chunks.models for p in model.parameters())
    alone = sharded_state.build_state(trainer.policy)
    gathering(monkeypatch)
    seen, empty = Allocations(), sharded_state.host_buffer
    monkeypatch.setattr(sharded_state, "host_buffer", lambda *a, **k: seen.on_host(empty(*a, **k)))
    with seen:
        entries = sharded_state.build_state(trainer.policy, copy=True)
    assert 0 < seen.peak["device"] / parameters <= 2.0
    # bf16 weights, three float32 tensors, and the buffers of the parameter at hand
    assert 14.0 <= seen.peak["host"] / parameters <= 16.0
    assert entries.keys() == alone.keys()
    assert all(torch.equal(entry.data, alone[name].data) for name, entry in entries.items())


def test_a_resume_reads_no_optimizer_state_of_parameters_whose_slices_other_ranks_have(
    trainer, monkeypatch, tmp_path
):
    places, read, names = optimizer_state.places, torch_dist.Reader.read_sharded, []
    trainer.checkpoints.save(1, None)
    assert trainer.checkpoints.wait()
    elsewhere = {name for name, _ in trainer.policy.chunks.models[0].named_parameters() if "layers.2" in name}
    lost = {id(p) for n, p in trainer.policy.chunks.models[0].named_parameters() if n in elsewhere}
    monkeypatch.setattr(
        optimizer_state,
        "places",
        lambda optimizer: {
            key: optimizer_state.Place(None, None) if key in lost else place
            for key, place in places(optimizer).items()
        },
    )
    monkeypatch.setattr(
        torch_dist.Reader, "read_sharded", lambda reader, wanted: (names.extend(wanted), read(reader, wanted))
    )
    assert trainer.checkpoints.resume()["step"] == 1
    state = {name for name in names if name.startswith("optimizer.")}
    assert any(".layers.1." in name for name in state) and not any(".layers.2." in name for name in state)
    assert any(name.startswith("weights.") and ".layers.2." in name for name in names)


def test_gathering_keeps_every_bit(trainer, monkeypatch):
    gathering(monkeypatch)
    monkeypatch.setattr(sharded_state, "CHUNK_ELEMENTS", 1000)  # no parameter's size is a multiple of it
    for place in optimizer_state.places(trainer.policy.optimizer).values():
        place.slot.tensor("exp_avg").view(-1)[:3] = torch.tensor([-0.0, float("nan"), 1e-42])
    entries = sharded_state.build_state(trainer.policy)
    first = entries["optimizer.exp_avg.model.norm.weight"].data[:3].view(torch.int32)
    assert first.tolist() == torch.tensor([-0.0, float("nan"), 1e-42]).view(torch.int32).tolist()


@pytest.mark.parametrize("where", ["host_buffer", "Stager._shard"])
def test_running_out_of_memory_while_copying_fails_the_save_and_not_the_run(trainer, monkeypatch, where):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 544.00 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_laser.trainer.checkpoint.sharded_state.{where}", full)
        trainer.checkpoints.save(1, None)
    assert not trainer.checkpoints.wait()
    assert trainer.checkpoints.trouble == (
        "copying the state to host memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 544.00 MiB."
    )
    trainer.checkpoints.save(1, None)
    assert trainer.checkpoints.wait()


def test_the_writing_thread_takes_no_cuda_stream(trainer, monkeypatch):
    def taken(*_, **__):
        raise AssertionError("this makes a context on device 0 for every rank")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._OverlappingCpuLoader", taken)
    entries = sharded_state.build_state(trainer.policy)
    monkeypatch.setattr(sharded_state, "build_state", lambda *_, **__: entries)
    with monkeypatch.context() as patch:
        patch.setattr(platform, "has_cuda", lambda: False)  # what torch's writer sees is the question
        patch.setattr(torch.cuda, "is_available", lambda: True)
        trainer.checkpoints.save(1, None)
    assert trainer.checkpoints.wait(), trainer.checkpoints.trouble


def test_every_parameter_has_one_owner_and_the_owners_have_about_equally_much():
    elements = [544, 27, 64, 9, 64, 27, 9, 27, 64] * 4
    for ranks in (1, 2, 3, 8):
        owners = sharded_state.storing_ranks(elements, ranks)
        loads = [sum(n for n, owner in zip(elements, owners) if owner == rank) for rank in range(ranks)]
        assert set(owners) <= set(range(ranks))
        assert max(loads) - min(loads) <= max(elements)
    assert sharded_state.storing_ranks([5, 5], 4) == [0, 1]

"""The platform layer: Megatron-Core without CUDA, and nothing changed for anybody else."""

import subprocess
import sys

import pytest
import torch
from helpers.torchrun import worker_environment

from megatron_laser.model import platform

platform.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the platform layer changes nothing on CUDA"
)


def test_installing_twice_changes_nothing_more():
    kept = (
        megatron_random.torch,
        torch.Tensor.type,
        torch.Tensor.cuda,
        megatron_random._CUDA_RNG_STATE_TRACKER,
    )
    platform.install()
    again = (
        megatron_random.torch,
        torch.Tensor.type,
        torch.Tensor.cuda,
        megatron_random._CUDA_RNG_STATE_TRACKER,
    )
    assert all(a is b for a, b in zip(kept, again))


def test_megatron_sees_a_cpu_where_it_names_cuda_and_everybody_else_the_real_torch():
    seen = megatron_random.torch
    assert seen is not torch
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.cuda.is_available() is False
    for device in ("cuda", 0, torch.device("cuda", 1)):
        assert seen.zeros(2, device=device).device.type == "cpu"
    assert seen.ones(2, device="meta").device.type == "meta"
    assert seen.zeros(3).device.type == "cpu"
    with seen.cuda.stream(seen.cuda.Stream()):
        seen.cuda.current_stream().wait_stream(seen.cuda.default_stream())
    assert seen.cuda.Event().query()
    assert seen.float32 is torch.float32 and isinstance(torch.ones(1), seen.Tensor)
    assert "proxy" not in type(torch.cuda).__name__.lower()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_tensor_type_reports_the_cuda_name_and_still_converts():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    tensor = torch.zeros(1)
    assert tensor.cuda() is tensor


def test_rng_tracker_gives_each_name_its_own_stream_and_leaves_the_global_one_alone():
    tracker = platform.CpuRngTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with tracker.fork("a"):
        first = torch.rand(1)
    with tracker.fork("b"):
        other = torch.rand(1)
    with tracker.fork("a"):
        second = torch.rand(1)
    assert torch.equal(torch.rand(2), expected)
    assert len({float(first), float(other), float(second)}) == 3
    assert torch.equal(torch.cat([first, second]), torch.rand(2, generator=torch.Generator().manual_seed(1)))


def test_rng_tracker_states_can_be_kept_and_restored():
    tracker = platform.CpuRngTracker()
    assert not tracker.is_initialized()
    tracker.add("a", 1)
    states = tracker.get_states()
    with tracker.fork("a"):
        first = torch.rand(3)
    tracker.set_states(states)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(3), first)
    with pytest.raises(RuntimeError, match="'a'"):
        tracker.add("a", 7)
    with pytest.raises(RuntimeError, match="seed 1"):
        tracker.add("c", 1)
    tracker.reset()
    assert not tracker.is_initialized()


def test_rng_tracker_restores_the_global_stream_after_an_error():
    tracker = platform.CpuRngTracker()
    tracker.add("a", 1)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), tracker.fork("a"):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_megatron_draws_model_parallel_numbers_from_the_cpu_tracker(single_process):
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    assert isinstance(tracker, platform.CpuRngTracker)
    with tracker.fork():
        first = torch.rand(2)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(2), first)


def test_a_run_without_torchrun_is_one_process_that_does_everything(single_process):
    runtime = single_process
    assert (runtime.rank, runtime.world_size, runtime.data_rank, runtime.data_size) == (0, 1, 0, 1)
    assert runtime.is_main and runtime.is_replica_leader and runtime.reports_rows
    assert runtime.replica_ranks == (0,)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1


def test_device_facts_of_a_cpu():
    assert platform.device() == torch.device("cpu")
    assert platform.collective_backend() == "gloo"
    assert "CPU" in platform.device_name()
    figures = platform.memory_gib()
    assert 0.05 < figures["memory/peak_rss_gib"] < 1000
    assert "memory/peak_device_gib" not in figures
    assert platform.reset_peak_memory_bytes() == platform.peak_memory_bytes() == 0


def test_nothing_is_changed_where_cuda_is_available():
    code = (
        "import torch; before = torch.Tensor.type, torch.Tensor.cuda\n"
        "from megatron_laser.model import platform\n"
        "platform.has_cuda = lambda: True\n"
        "platform.install()\n"
        "from megatron.core.tensor_parallel import random\n"
        "assert random.torch is torch and (torch.Tensor.type, torch.Tensor.cuda) == before\n"
        "assert not isinstance(random._CUDA_RNG_STATE_TRACKER, platform.CpuRngTracker)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=worker_environment(), timeout=60)

"""What a whole train step allocates: nothing of the size of float32 logits of its labelled rows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laser.model import platform

platform.install()

from megatron_laser.benchmarks.measure import peak_allocated_bytes  # noqa: E402
from megatron_laser.benchmarks.step import LASER, StepBenchmark  # noqa: E402
from megatron_laser.distributed import runtime  # noqa: E402
from megatron_laser.ops import configure  # noqa: E402

# 2056 labelled rows in one micro-batch, times 16384 columns of float32: 135 MB. One tile of the op is 64 MiB.
SHAPE = dict(prompts=2, samples=4, response_length=256, hidden=32, layers=1, vocabulary=16384)
LABELLED = 8 * 257
LOGITS_BYTES = LABELLED * SHAPE["vocabulary"] * 4


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that an operation returned, in the forward and in the backward."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.fixture
def step(tmp_path):
    """A LaSeR train step (old-policy pass, forward, backward, optimizer), warmed up once."""
    torch.set_num_threads(1)
    benchmark = StepBenchmark(**SHAPE)
    flat = benchmark.rollouts()
    benchmark.save_model(tmp_path)
    trainer = benchmark._trainers(tmp_path, budget=4096)[LASER]
    trainer.train_step(flat, 1)
    before = configure(tile_bytes=32 * 2**20)  # of the Triton backend; the reference has its own 64 MiB
    yield lambda: trainer.train_step(flat, 2)
    configure(tile_bytes=before.tile_bytes)
    runtime.stop()


def test_no_operation_of_a_train_step_allocates_the_logits(step):
    with LargestTensor() as dense:
        logits = torch.zeros(LABELLED, SHAPE["vocabulary"], requires_grad=True)
        torch.log_softmax(logits, dim=1).sum().backward()
    assert dense.nbytes >= LOGITS_BYTES  # the hook sees the tensor that must not exist
    with LargestTensor() as seen:
        step()
    assert 0 < seen.nbytes <= 64 * 2**20 < LOGITS_BYTES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_train_step_leaves_no_room_for_the_logits(step):
    assert 0 < peak_allocated_bytes(step) < LOGITS_BYTES

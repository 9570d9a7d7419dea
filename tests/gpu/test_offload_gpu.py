"""On a CUDA device the trainer's state really gives memory back, and returns bit for bit from pinned memory."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def state_of(model, adam, buffer):
    moments = [value for state in adam.state.values() for value in state.values()]
    return [*model.parameters(), *(value for value in moments if value.is_cuda), buffer.grad_data]


def test_memory_is_free_while_the_state_is_away():
    from megatron_laser.model import platform
    from megatron_laser.trainer.offload import ALL_PARTS, StateOffload

    torch.manual_seed(0)
    model = torch.nn.Linear(4096, 4096, bias=False, device="cuda")
    adam = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4096, device="cuda")).sum().backward()
    adam.step()
    adam.zero_grad()
    buffer = SimpleNamespace(grad_data=torch.zeros(model.weight.numel(), device="cuda"))
    policy = SimpleNamespace(
        chunks=SimpleNamespace(
            models=[model], wrapped=[SimpleNamespace(buffers=[buffer], expert_parallel_buffers=[])]
        ),
        optimizer=SimpleNamespace(optimizer=adam, zero_grad=adam.zero_grad),
    )
    tensors = state_of(model, adam, buffer)
    before = [tensor.detach().cpu() for tensor in tensors]
    held, free = torch.cuda.memory_allocated(), platform.free_memory_bytes()
    state = StateOffload(policy)
    for _ in range(2):
        freed = state.offload(ALL_PARTS)
        assert (
            freed == sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 4 * 4096 * 4096 * 4
        )
        assert held - torch.cuda.memory_allocated() >= freed
        assert platform.free_memory_bytes() >= free + freed  # other processes can have it
        assert state.onload(ALL_PARTS) == freed
        for tensor, values in zip(tensors, before):
            assert torch.equal(tensor.detach().cpu(), values)

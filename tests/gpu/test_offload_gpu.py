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
    state = StateOffload(policy.chunks, policy.optimizer)
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


def test_layers_inputs_come_back_as_they_were_and_take_no_device_memory_meanwhile() -> None:
    from torch.utils.checkpoint import checkpoint

    from megatron_laser.model.activation_offload import offloading

    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, device="cuda") for _ in range(16))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            hidden = checkpoint(lambda x, layer=layer: layer(x).relu(), hidden, use_reentrant=True)
        return hidden

    given = torch.randn(8192, 1024, device="cuda")
    gradients, held = [], []
    for run in (forward, offloading(layers, forward)):
        for _ in range(2):  # the second time with host buffers that have been used
            layers.zero_grad()
            inputs = given.clone().requires_grad_()
            before = torch.cuda.memory_allocated()
            output = run(inputs)
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated() - before)
            output.square().sum().backward()
            gradients.append([inputs.grad, *(parameter.grad.clone() for parameter in layers.parameters())])
    for other in gradients[1:]:
        assert all(torch.equal(one, same) for one, same in zip(gradients[0], other))
    size = given.numel() * given.element_size()
    assert held[1] >= 15 * size and held[3] <= 2 * size

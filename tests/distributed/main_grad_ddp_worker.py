"""The op's dW in main_grad under Megatron's DistributedDataParallel, against the same gradient through autograd.

Started by test_main_grad_ddp.py on one rank and on two; exits non-zero when a claim does not hold.
"""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.runs import run_config
from helpers.torchrun import run_worker
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_laser.distributed import runtime as runtimes
from megatron_laser.ops import add_weight_gradient_to_main_grad, linear_logprob

ROWS, HIDDEN, COLUMNS = 9, 16, 64


class Toy(torch.nn.Module):
    """`kind`: untied, an embedding and a head; tied, one weight for both; copy, the last stage's."""

    def __init__(self, kind, fused):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.middle = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator))
        self.weight = torch.nn.Parameter(torch.randn(COLUMNS, HIDDEN, generator=generator))
        self.embedding = torch.nn.Parameter(self.weight.detach().clone()) if kind == "untied" else self.weight
        if kind != "untied":
            # What Megatron's setup_embeddings_and_output_layer sets for shared weights.
            self.weight.zero_out_wgrad = True
        self.kind, self.fused = kind, fused

    def forward(self, ids, labels):
        if self.fused:
            add_weight_gradient_to_main_grad(self.weight)
        table = self.embedding.detach() if self.kind == "copy" else self.embedding
        return linear_logprob(torch.tanh(table[ids] @ self.middle), self.weight, labels).logprobs.sum()


def main_grads(kind, fused, overlap, distributed):
    """({parameter: main_grad after two micro-batches and the reduction}, names in the order of their hooks)."""
    model = Toy(kind, fused)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=overlap,
            bucket_size=HIDDEN * COLUMNS // 2,
        ),
        model,
    )
    ddp.zero_grad_buffer()
    ready = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in ddp.bucket_groups:
        original = group.register_grad_ready

        def register(parameter, *rest, original=original):
            ready.append(names[parameter])
            return original(parameter, *rest)

        group.register_grad_ready = register
    for batch in range(2):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + batch)
        ids, labels = torch.randint(0, COLUMNS, (2, ROWS), generator=generator)
        if batch == 0 and overlap:
            with ddp.no_sync():
                ddp(ids, labels).backward()
        else:
            ddp(ids, labels).backward()
        assert all(parameter.grad is None for parameter in model.parameters())  # the hook of each has fired
    ddp.finish_grad_sync()
    return {name: parameter.main_grad.clone() for parameter, name in names.items()}, ready


def main() -> None:
    folder = Path(sys.argv[1])
    runtimes.start(run_config(folder, folder / "model"))
    for kind, overlap, distributed in itertools.product(
        ("untied", "tied", "copy"), (False, True), (False, True)
    ):
        case = f"{kind} {overlap=} {distributed=}"
        expected, order = main_grads(kind, False, overlap, distributed)
        got, same_order = main_grads(kind, True, overlap, distributed)
        assert sorted(order) == sorted(same_order) and bool(order) == overlap, (case, order, same_order)
        assert expected["weight"].abs().max() > 0.1, case
        for name, want in expected.items():
            torch.testing.assert_close(
                got[name], want, atol=1e-5, rtol=1e-5, msg=lambda text, c=(case, name): f"{c}\n{text}"
            )
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)

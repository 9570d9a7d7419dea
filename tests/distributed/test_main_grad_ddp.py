"""The log-prob op's dW goes to main_grad without a gradient for autograd, and Megatron's wrapper does as before."""

from pathlib import Path

import pytest
from helpers.models import save_tiny_model
from helpers.ranks import run_ranks

WORKER = Path(__file__).with_name("main_grad_ddp_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_main_grads_hooks_and_reductions_are_those_of_a_gradient_through_autograd(tmp_path, processes):
    save_tiny_model(tmp_path / "model", "qwen2")
    run_ranks(WORKER, processes, tmp_path)

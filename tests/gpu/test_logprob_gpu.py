"""The log-prob op on a CUDA device: bf16 against float64, bitwise repeatable, within its memory."""

import dataclasses

import pytest
import torch
from helpers.logprob import gradients, inputs, largest_logit, reference, tensor_core_tolerance

from megatron_laser.ops import configure, few_row_logprob, linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

if torch.cuda.is_available():
    from megatron_laser.ops import gpu_backend
    from megatron_laser.ops.cuda import few_rows as cuda_few_rows
    from megatron_laser.ops.cuda.plan import plans
    from megatron_laser.ops.device import capability
    from megatron_laser.ops.triton.engine import ChunkedEngine
    from megatron_laser.ops.triton.few_rows import FewRowEngine
    from megatron_laser.ops.triton.fused import FusedEngine

    HOPPER = capability(torch.device("cuda", torch.cuda.current_device())) >= (9, 0)
    ENGINES = {"chunked": ChunkedEngine, **({"fused": FusedEngine} if HOPPER else {})}
    FEW_ROWS = {"few_rows": FewRowEngine, "fused": FusedEngine} if HOPPER else {}
else:
    ENGINES, FEW_ROWS = {"chunked": None}, {"few_rows": None}

engines = pytest.mark.parametrize("name", ENGINES)
# Odd sizes in every dimension but the hidden one, which the copy engine wants in multiples of 8.
SHAPES = [(1, 64, 100), (37, 128, 1003), (300, 896, 5001), (1025, 1536, 20011)]


@pytest.fixture(autouse=True)
def settings():
    """Small tiles, so that several slices are merged; what was set before comes back."""
    before = configure(tile_bytes=8 * 2**20, keep_logits_bytes=0)
    yield
    configure(**dataclasses.asdict(before))


def problem(rows, hidden_size, columns):
    """On the device, in bf16, with logits of a few nats."""
    hidden, weight, labels = inputs(rows, hidden_size, columns, torch.bfloat16, scale=hidden_size**-0.5 * 4)
    return hidden.cuda(), weight.cuda(), labels.cuda()


def assert_exact(actual, expected, hidden, weight, **scaling):
    """Equal to float64 up to what the tensor cores' accumulator loses."""
    atol = tensor_core_tolerance(largest_logit(hidden, weight, **scaling), hidden.shape[1])
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=1e-6)


@engines
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_bf16_against_float64(name, shape, with_entropy):
    hidden, weight, labels = problem(*shape)
    vocab_size = shape[2] - 3
    labels.clamp_(max=vocab_size - 1)
    per_row = torch.linspace(0.5, 1.5, shape[0], device="cuda")
    settings = dict(inv_temperature=per_row, vocab_size=vocab_size)
    expected = gradients(
        lambda x, w: reference(x, w, labels, **settings)[: 1 + with_entropy], hidden.double(), weight.double()
    )
    actual = gradients(
        lambda x, w: gpu_backend.linear_logprob(
            x, w, labels, with_entropy=with_entropy, engine=ENGINES[name](), **settings
        ),
        hidden,
        weight,
    )
    for got, want in zip(actual[0], expected[0]):
        assert_exact(got, want, hidden, weight, **settings)
    for got, want in zip(actual[1:], expected[1:]):
        # The logits' gradient is rounded to bf16 once (2^-9 of each value), the sums are float32.
        assert (got.double() - want).norm() <= 2**-7 * want.norm()
    assert not actual[2][vocab_size:].any()


@pytest.mark.parametrize("name", {**ENGINES, **FEW_ROWS})
def test_the_mean_error_is_that_of_torchs_own_product(name):
    """The tolerance above would hide a small bias of our own; the vendor's product shows what is the hardware's."""
    hidden, weight, labels = problem(512, 5120, 20011)
    labelled = labels >= 0
    if name in ENGINES:
        actual = gpu_backend.linear_logprob(hidden, weight, labels, engine=ENGINES[name]()).logprobs
    else:
        actual = gpu_backend.few_row_logprob(hidden, weight, labels, engine=FEW_ROWS[name]())
    exact = reference(hidden, weight, labels)[0]
    product = torch.mm(hidden, weight.T, out_dtype=torch.float32).double()
    vendor = torch.log_softmax(product, 1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    bias, allowed = ((one.double() - exact)[labelled].mean().abs().item() for one in (actual, vendor))
    # Another order of additions loses another share of the same ulps.
    assert bias <= 3 * allowed + 2e-5


@engines
def test_twice_the_same_bits(name):
    hidden, weight, labels = problem(1025, 1536, 20011)
    runs = [
        gradients(
            lambda x, w: gpu_backend.linear_logprob(x, w, labels, with_entropy=True, engine=ENGINES[name]()),
            hidden,
            weight,
        )
        for _ in range(3)
    ]
    first = [*runs[0][0], *runs[0][1:]]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, [*other[0], *other[1:]]))


@pytest.mark.parametrize("name", FEW_ROWS)
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 128, 300, 512])
@pytest.mark.parametrize("columns", [100, 20011])
def test_few_rows_against_float64(name, rows, columns):
    hidden, weight, labels = problem(rows, 1536, columns)
    actual = [
        gpu_backend.few_row_logprob(
            hidden, weight, labels.clamp(max=columns - 4), vocab_size=columns - 3, engine=FEW_ROWS[name]()
        )
        for _ in range(2)
    ]
    expected = reference(hidden, weight, labels.clamp(max=columns - 4), vocab_size=columns - 3)[0]
    assert_exact(actual[0], expected, hidden, weight, vocab_size=columns - 3)
    assert torch.equal(*actual)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("hidden_size", [64, 200, 1536, 5120])
@pytest.mark.parametrize("columns", [100, 20011])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_cuda_kernels_against_float64(rows, hidden_size, columns, pairs):
    hidden, weight, labels = problem(rows, hidden_size, columns)
    reason = cuda_few_rows.refuses(hidden, weight)
    if reason is not None:
        pytest.skip(f"the CUDA C++ kernel cannot run: {reason}")
    labels.clamp_(max=columns - 4)
    expected = reference(hidden, weight, labels, vocab_size=columns - 3)[0]
    for plan in (plan for plan in plans(rows) if plan.pairs == pairs):
        check_cuda_kernel(plan, hidden, weight, labels, columns, expected)


def check_cuda_kernel(plan, hidden, weight, labels, columns, expected):
    engine = cuda_few_rows.CudaFewRowEngine(plan)
    actual = [
        gpu_backend.few_row_logprob(hidden, weight, labels, vocab_size=columns - 3, engine=engine)
        for _ in range(2)
    ]
    assert_exact(actual[0], expected, hidden, weight, vocab_size=columns - 3)
    assert torch.equal(*actual)


def test_the_public_calls_choose_kernels_by_themselves():
    hidden, weight, labels = problem(200, 512, 5001)
    expected = reference(hidden, weight, labels)[0]
    for actual in (linear_logprob(hidden, weight, labels).logprobs, few_row_logprob(hidden, weight, labels)):
        assert_exact(actual, expected, hidden, weight)


@engines
def test_peak_memory_is_that_of_the_tiles(name):
    configure(tile_bytes=32 * 2**20)
    hidden, weight, labels = problem(4096, 512, 65536)
    hidden.requires_grad_()
    weight.requires_grad_()
    for backward in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprobs = gpu_backend.linear_logprob(hidden, weight, labels, engine=ENGINES[name]()).logprobs
        if backward:
            logprobs.sum().backward()
        torch.cuda.synchronize()
        # Float32 logits alone would be 1 GiB. Tile, its bf16 gradient, dX twice, dW, and the products' workspace.
        assert torch.cuda.max_memory_allocated() - before < 300 * 2**20


@pytest.mark.parametrize("with_entropy", [False, True])
def test_kept_probabilities_cost_at_most_their_rounding(with_entropy):
    hidden, weight, labels = problem(300, 896, 5001)

    def op(x, w):
        return gpu_backend.linear_logprob(x, w, labels, with_entropy=with_entropy, engine=ChunkedEngine())

    exact = gradients(op, hidden, weight)
    configure(keep_logits_bytes=2**30)
    kept = gradients(op, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(exact[0], kept[0]))
    for one, other in zip(exact[1:], kept[1:]):
        assert (one.double() - other.double()).norm() <= 2**-6 * one.double().norm()


def test_rows_without_a_gradient_and_repeated_rows_with_kept_probabilities():
    hidden, weight, labels = problem(300, 896, 5001)
    factor = torch.randn(300, device="cuda") * (torch.arange(300, device="cuda") % 3 == 0)
    rows = torch.arange(300, device="cuda") // 2
    grads = []
    for keep in (0, 2**30):
        configure(keep_logits_bytes=keep)
        x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        (linear_logprob(x, w, labels, rows=rows).logprobs * factor).sum().backward()
        assert not x.grad[150:].any()
        grads.append((x.grad, w.grad))
    for one, other in zip(*grads):
        assert (one.double() - other.double()).norm() <= 2**-6 * one.double().norm()


def test_the_loss_inside_blocks_of_rows_equals_two_passes():
    hidden, weight, labels = problem(512, 896, 5001)
    factor = torch.randn(512, device="cuda")
    calls, results = [], []
    for keep in (2**30, 128 * 5008 * 2):
        configure(keep_logits_bytes=keep, min_block_rows=64)

        def loss(logprobs, entropy, rows):
            calls.append(rows)
            return (logprobs.exp() * factor[rows]).sum()

        x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        found = linear_logprob(x, w, labels, loss=loss, backend="triton").logprobs
        (found.exp() * factor).sum().backward()
        results.append((found.detach(), x.grad, w.grad))
    assert len(calls) == 4
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:]):
        assert (one.double() - other.double()).norm() <= 2**-6 * one.double().norm()

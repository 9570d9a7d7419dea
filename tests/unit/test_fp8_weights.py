"""FP8 weights for servers: codes and scales of a matrix, and stream, buckets, folders and checksums with them."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_laser.config.model_folder.quantized import is_quantized
from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.weight_sync.buckets import buckets
from megatron_laser.weight_sync.checksums import ServerLayout, StreamDigest
from megatron_laser.weight_sync.fp8 import as_served, quantize_blocks

# Every value of float8_e4m3fn, in order.
GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
GRID = GRID[GRID.isfinite()].unique()


def blocks(shape):
    """Slices of each block of 128 x 128, by its place."""
    rows, columns = shape
    for i in range(-(-rows // 128)):
        for j in range(-(-columns // 128)):
            yield (i, j), (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (1, 5)])
def test_codes_times_scales_are_nearest_to_the_weights(shape, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.02 * torch.rand(shape[0], 1).exp2()).to(dtype)
    codes, scales = quantize_blocks(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == shape and codes.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for place, part in blocks(shape):
        exact, held = weight[part].double(), codes[part].double()
        assert scales[place].item() == pytest.approx(exact.abs().max().item() / 448, rel=1e-6)
        assert held.abs().max() == 448
        wanted = exact / scales[place].double()
        nearest = (wanted[..., None] - GRID).abs().amin(-1)
        # The quotient is rounded to float32 first.
        assert ((wanted - held).abs() <= nearest + 1e-6 * wanted.abs()).all()


def test_what_fp8_can_hold_comes_back_exactly():
    torch.manual_seed(1)
    values = GRID[torch.randint(len(GRID), (256, 128))]
    values[0, 0], values[128, 0] = 448, -448
    scale = torch.tensor([2.0**-9, 2.0**3]).repeat_interleave(128)[:, None]
    codes, scales = quantize_blocks(values * scale)
    assert scales.tolist() == [[2.0**-9], [2.0**3]]
    assert codes.double().equal(values)


def test_ties_go_to_the_even_code():
    weight = torch.zeros(1, 3)
    weight[0] = torch.tensor([448.0, 17.0, 19.0])  # codes are 2 apart from 16 on
    assert quantize_blocks(weight)[0].tolist() == [[448.0, 16.0, 20.0]]


def test_zeros_stay_zeros_and_a_block_does_not_change_its_neighbours():
    weight = torch.zeros(256, 256)
    weight[:128, 128:] = torch.randn(128, 128)
    codes, scales = quantize_blocks(weight)
    assert scales.isfinite().all() and (scales > 0).all()
    assert codes[128:].double().eq(0).all() and codes[:128, :128].double().eq(0).all()
    alone, scale = quantize_blocks(weight[:128, 128:])
    assert codes[:128, 128:].double().equal(alone.double()) and scales[0, 1] == scale[0, 0]


STREAM = [
    ("model.embed_tokens.weight", (64, 128)),
    ("model.layers.0.self_attn.q_proj.weight", (512, 128)),
    ("model.layers.0.self_attn.q_proj.bias", (512,)),
    ("model.layers.0.self_attn.k_proj.weight", (256, 128)),
    ("model.layers.0.self_attn.v_proj.weight", (256, 128)),
    ("model.layers.0.self_attn.q_norm.weight", (128,)),
    ("model.layers.0.self_attn.o_proj.weight", (128, 512)),
    ("model.layers.0.mlp.gate.weight", (2, 128)),
    *(
        (f"model.layers.0.mlp.experts.{expert}.{name}.weight", shape)
        for expert in range(2)
        for name, shape in (("gate_proj", (256, 128)), ("up_proj", (256, 128)), ("down_proj", (128, 256)))
    ),
    ("model.layers.1.mlp.gate_proj.weight", (256, 128)),
    ("model.layers.1.mlp.up_proj.weight", (256, 128)),
    ("model.layers.1.mlp.down_proj.weight", (128, 256)),
    ("model.norm.weight", (128,)),
    ("lm_head.weight", (64, 128)),
]


@pytest.fixture
def weights():
    torch.manual_seed(2)
    return [(name, torch.randn(shape)) for name, shape in STREAM]


def served(weights):
    return as_served(weights, dtype=torch.bfloat16, quantized=True)


def test_matrices_are_followed_by_their_scales_and_the_rest_is_plain(weights):
    found, order = dict(served(weights)), [name for name, _ in served(weights)]
    plain = {"embed_tokens", "q_norm", "gate", "norm", "lm_head"}
    expected = []
    for name, tensor in weights:
        expected.append(name)
        rounded = tensor.bfloat16()
        if name.endswith("bias") or name.split(".")[-2] in plain:
            assert not is_quantized(name) and found[name].equal(rounded)
            continue
        codes, scales = quantize_blocks(rounded)
        assert found[name].view(torch.uint8).equal(codes.view(torch.uint8))
        assert found[f"{name}_scale_inv"].equal(scales)
        expected.append(f"{name}_scale_inv")
    assert order == expected


def test_without_quantization_the_stream_is_only_cast(weights):
    found = list(as_served(weights, dtype=torch.bfloat16, quantized=False))
    assert [name for name, _ in found] == [name for name, _ in weights]
    assert all(got.equal(tensor.bfloat16()) for (_, got), (_, tensor) in zip(found, weights))


def test_tensors_of_a_mixed_bucket_are_aligned_and_read_back(weights):
    expected, read = dict(served(weights)), {}
    for bucket in buckets(served(weights), 100_000):
        flat, told, place = bucket.flat(), bucket.describe(), 0
        for name, kind, shape in zip(told["names"], told["dtypes"], told["shapes"]):
            dtype = getattr(torch, kind)
            assert place % dtype.itemsize == 0
            size = torch.Size(shape).numel() * dtype.itemsize
            read[name] = flat[place : place + size].view(dtype).reshape(shape)
            place += size
        assert place == len(flat)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (
            read[name].view(torch.uint8).equal(tensor.view(torch.uint8)) and read[name].dtype == tensor.dtype
        )


def test_a_folder_keeps_codes_and_scales(weights, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    folder = write_hf_folder(
        served(weights), tmp_path / "out", source=tmp_path / "model", dtype=torch.bfloat16, cast=False
    )
    read, expected = load_file(folder / "model.safetensors"), dict(served(weights))
    assert {name: tensor.dtype for name, tensor in read.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(read[name].view(torch.uint8).equal(t.view(torch.uint8)) for name, t in expected.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def sha(*parts):
    data = b"".join(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts)
    return hashlib.sha256(data).digest()[:8].hex()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_has_its_share_of_codes_and_of_scales(weights, size):
    """4 query heads of 128 rows; 2 heads of keys and values, each of which 2 of 4 ranks hold."""
    digest = StreamDigest(on_cpu=True, sizes={size}, layout=ServerLayout(heads=4))
    # 256 rows of an MLP are two blocks, which do not go to four ranks.
    list(digest.watch(item for item in served(weights) if size < 4 or ".mlp." not in item[0]))
    held = dict(served(weights))
    attention, experts, mlp = (
        "model.layers.0.self_attn.",
        "model.layers.0.mlp.experts.",
        "model.layers.1.mlp.",
    )
    for rank in range(size):
        sums = digest.sums(size, rank)
        for kind in ("weight", "weight_scale_inv"):

            def rows(name, parts=size, part=rank, kind=kind):
                return held[f"{name}.{kind}"].chunk(parts)[part]

            def columns(name, rank=rank, kind=kind):
                return held[f"{name}.{kind}"].chunk(size, dim=1)[rank]

            few = min(size, 2)
            assert sums[f"{attention}qkv_proj.{kind}"] == sha(
                rows(f"{attention}q_proj"),
                *(rows(f"{attention}{x}_proj", few, rank * few // size) for x in "kv"),
            )
            assert sums[f"{attention}o_proj.{kind}"] == sha(columns(f"{attention}o_proj"))
            if size == 4:
                continue
            assert sums[f"{mlp}gate_up_proj.{kind}"] == sha(rows(f"{mlp}gate_proj"), rows(f"{mlp}up_proj"))
            assert sums[f"{mlp}down_proj.{kind}"] == sha(columns(f"{mlp}down_proj"))
            assert sums[f"{experts}w13_{kind}"] == sha(
                *(rows(f"{experts}{e}.{name}_proj") for e in range(2) for name in ("gate", "up"))
            )
            assert sums[f"{experts}w2_{kind}"] == sha(*(columns(f"{experts}{e}.down_proj") for e in range(2)))
        assert sums["model.norm.weight"] == sha(held["model.norm.weight"])


def test_one_other_scale_or_code_is_another_sum(weights):
    def sums(change):
        digest = StreamDigest(on_cpu=False, layout=ServerLayout(heads=4))
        list(digest.watch((name, change(name, tensor)) for name, tensor in served(weights)))
        return digest.sums()

    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    plain = sums(lambda _, tensor: tensor)
    for changed in (name, f"{name}_scale_inv"):
        other = sums(lambda seen, tensor, changed=changed: tensor.roll(1) if seen == changed else tensor)
        server = changed.replace("1.down_proj.", "w2_")
        assert {key for key in plain if plain[key] != other[key]} == {server}

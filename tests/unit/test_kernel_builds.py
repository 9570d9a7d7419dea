"""Every kernel compiled for an H100/H200 without one: instructions, spills, shared memory; and how the build fails."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laser.ops import dispatch
from megatron_laser.ops.cuda import build as cuda_build
from megatron_laser.ops.cuda import nvrtc as cuda_nvrtc
from megatron_laser.ops.cuda.plan import MARGIN, Plan, choose, every_plan, plans
from megatron_laser.ops.dispatch import Shape

ROOT = Path(__file__).parents[2]


def compiler_missing():
    """Why the CUDA C++ kernel cannot be compiled here, or None."""
    if cuda_build.find_nvcc() is not None:
        return None
    try:
        cuda_nvrtc.find_nvrtc()
    except cuda_nvrtc.NvrtcError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def reports():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "inspect_kernels.py"), "--json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout.startswith("["), done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_triton_kernels_meet_hoppers_rules_at_their_production_tiles(reports):
    names = {one["kernel"] for one in reports}
    assert names >= {
        *("tile_statistics", "tile_gradient", "fused_statistics", "few_row_statistics"),
        *("merge_partials", "finish_partials", "pick_rows"),
    }
    assert not [
        (one["kernel"], one["variant"], one["broken_rules"]) for one in reports if one["broken_rules"]
    ]
    products = [one for one in reports if one["product"]]
    assert len(products) >= 5
    for one in products:
        assert one["wgmma"] > 0 and one["tma"] > 0 and one["mma_sync"] == 0, one
    for one in reports:
        assert 0 < one["registers"] <= 255 and one["stack_bytes"] == 0, one
        assert one["shared_bytes"] <= 227 * 1024, one


@pytest.mark.slow
@pytest.mark.skipif(compiler_missing() is not None, reason=f"no CUDA compiler: {compiler_missing()}")
def test_the_cuda_kernel_compiles_for_sm_90a_without_spills(reports):
    found = [one for one in reports if one["kernel"].endswith("(CUDA)")]
    assert [one["shared_bytes"] for one in found] == [plan.shared_bytes for plan in every_plan()]
    for one in found:
        # A step of 64 columns of the hidden size is four products, in the weight-left form of two halves of the tile.
        assert one["stack_bytes"] == 0 and one["wgmma"] > 0 and one["wgmma"] % 4 == 0 and one["tma"] > 0, one
        assert one["shared_bytes"] <= 227 * 1024, one


def test_the_plans_kernels_are_those_of_the_source():
    source = cuda_build.source()
    assert "constexpr int TILE_COLUMNS = 256;" in source and "constexpr int THREADS = 384;" in source
    for plan in every_plan():
        if plan.pairs:
            assert f"FEW_ROW_PAIRS_OF({plan.columns})" in source
            assert f"FEW_ROW_PAIRS({plan.rows}, N)" in source
        else:
            assert f"FEW_ROWS({plan.rows})" in source and plan.threads == 384
        assert f"struct Wgmma<{plan.columns if plan.pairs else plan.rows}>" in source


# A whole vocabulary of 152064, a half, a quarter and an eighth of it, and an eighth of 128256 and of 151936.
@pytest.mark.parametrize("rows", [1, 16, 64, 128])
@pytest.mark.parametrize("columns", [152064, 76032, 38016, 19008, 16032, 18992, 100])
def test_tiles_cover_the_shard_and_fill_the_multiprocessors(rows, columns):
    plan = choose(rows, columns, 132, 5120)
    programs, rounds = plan.programs(columns, 132), plan.rounds(columns, 132)
    assert plan.rows >= rows and programs <= 132 and not (plan.pairs and programs % 2)
    assert plan.columns * programs * rounds >= columns > plan.columns * programs * (rounds - 1)
    times = {other: other.seconds(columns, 132, 5120) for other in plans(rows)}
    assert times[plan] <= MARGIN * min(times.values())
    # No time is below one read of the shard.
    assert times[plan] >= columns * 5120 * 2 / 4.3e12


def test_an_eighth_of_the_vocabulary_goes_to_all_multiprocessors():
    for rows in (16, 64, 128):
        for columns, tile in ((19008, 144), (18992, 144), (16032, 128)):
            plan = choose(rows, columns, 132, 5120)
            assert plan == Plan(True, max(rows, 64), tile), (rows, columns)
            assert plan.programs(columns, 132) >= 126 and plan.rounds(columns, 132) == 1
    # The weight-left form is bound by its products there, and by the weight's read on a whole vocabulary.
    left = Plan(False, 128, 256)
    assert left.seconds(19008, 132, 5120) > 1.25 * choose(128, 19008, 132, 5120).seconds(19008, 132, 5120)
    assert not choose(16, 152064, 132, 5120).pairs


@pytest.mark.skipif(compiler_missing() is not None, reason=f"no CUDA compiler: {compiler_missing()}")
def test_a_build_is_pipelined_and_cached_under_a_name_of_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_LASER_CACHE", str(tmp_path / "cache"))
    compile_kernel, messages = cuda_build.compile_kernel, []
    monkeypatch.setattr(
        cuda_build, "compile_kernel", lambda target: messages.append(compile_kernel(target)) or messages[-1]
    )
    built = cuda_build.built_kernel()
    # ptxas says so when it has to wait after each wgmma, which costs most of the speed.
    assert len(messages) == 1 and "registers" in messages[0] and "serialized" not in messages[0]
    assert built.parent == tmp_path / "cache" and built.read_bytes()[:4] == b"\x7fELF"
    monkeypatch.setattr(cuda_build, "compile_kernel", lambda target: pytest.fail("compiled again"))
    assert cuda_build.built_kernel() == built
    changed = cuda_build.source() + "\n"
    monkeypatch.setattr(cuda_build, "source", lambda: changed)
    monkeypatch.setattr(cuda_build, "compile_kernel", lambda target: target.write_bytes(b"new"))
    assert cuda_build.built_kernel() != built


def test_without_a_compiler_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_LASER_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)

    def missing():
        raise cuda_nvrtc.NvrtcError("libnvrtc was not found")

    monkeypatch.setattr(cuda_nvrtc, "find_nvrtc", missing)
    with pytest.raises(
        cuda_build.BuildError, match=r"nvcc was not found.*libnvrtc was.*nvidia-cuda-nvrtc.*Triton kernel"
    ):
        cuda_build.built_kernel()
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_a_build_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGATRON_LASER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(cuda_build.BuildError, match="set MEGATRON_LASER_CACHE"):
        cuda_build.built_kernel()


def test_a_compiler_that_fails_is_followed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: tmp_path / "nvcc")  # cannot be started
    monkeypatch.setattr(
        cuda_build, "compile_to_cubin", lambda source, name, options: (b"cubin", "2 registers")
    )
    assert cuda_build.compile_kernel(tmp_path / "out") == "2 registers"
    assert (tmp_path / "out").read_bytes() == b"cubin"


@pytest.mark.parametrize(
    ("rows", "tma", "cuda", "expected"),
    [
        (16, None, None, "cuda"),
        (128, None, None, "cuda"),
        (16, None, "no compiler", "few_rows"),
        (100, None, "no compiler", "fused"),
        (129, None, None, "fused"),
        (255, None, None, "fused"),
        (256, None, None, "chunked"),
        (5000, None, None, "chunked"),
        (16, "odd rows", None, "chunked"),
    ],
)
def test_the_few_row_dispatcher_says_what_it_chose_and_why(rows, tma, cuda, expected):
    choice = dispatch.choose_few_rows(Shape(rows, 5120, 152064), tma_refuses=tma, cuda_refuses=cuda)
    assert choice.name == expected
    assert (tma or cuda or str(rows)) in choice.reason or expected == "chunked"


def test_the_forward_dispatcher_falls_back_where_the_copy_engine_cannot_read():
    many, few = Shape(256, 5120, 152064), Shape(255, 5120, 152064)
    assert dispatch.choose_forward(many, tma_refuses=None).name == "chunked"
    assert dispatch.choose_forward(few, tma_refuses=None).name == "fused"
    refused = dispatch.choose_forward(few, tma_refuses="float32 would be rounded")
    assert refused.name == "chunked" and "float32" in refused.reason


def test_the_rule_of_256_rows_follows_from_its_arithmetic():
    """Per logit nothing depends on the rows but the weight's read, which is the whole time up to about 180 rows."""
    product, memory, hidden_size = 790e12, 4.3e12, 5120
    balance = next(rows for rows in range(1, 1000) if 2 * rows / product >= 2 / memory)
    assert 170 < balance < 190
    for rows in (256, 512, 1024, 16384):
        read = 2 / memory / rows  # of the weight, per logit and column of the hidden size
        products = max(2 / product, read)
        logits = 8 / memory / 0.9 / hidden_size  # written, and read once more
        chunked = (products * 1.02 + logits) / products
        fused = max(2 / 620e12, read) / products
        assert chunked < fused, rows
    assert dispatch.FORWARD_RULES[0].rows == 256 and balance < 256

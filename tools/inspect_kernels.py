"""Compiles every kernel for an H100/H200 (no GPU needed) and prints registers, shared memory, spills, instructions.

    python tools/inspect_kernels.py            a table
    python tools/inspect_kernels.py --json     one JSON list

Triton's kernels are compiled at their production tiles for sm_90, with Triton's own ptxas and disassembler; the CUDA
C++ kernels for sm_90a with nvcc, or NVRTC where there is none. Exit status 1 if a kernel breaks a rule: no spills, at
most 227 KB of shared memory, and in kernels with a product wgmma (no mma.sync) fed by the copy engine (TMA).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# Interpreted functions cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

SHARED_LIMIT = 227 * 1024


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses. `product`: it multiplies matrices itself."""

    kernel: str
    variant: str
    product: bool
    registers: int
    shared_bytes: int
    stack_bytes: int
    wgmma: int
    mma_sync: int
    tma: int

    def broken_rules(self) -> list[str]:
        """Sentences, empty when all is well."""
        broken = []
        if self.stack_bytes:
            broken.append(f"{self.stack_bytes} bytes of stack: registers are spilled")
        if self.shared_bytes > SHARED_LIMIT:
            broken.append(f"{self.shared_bytes} bytes of shared memory, at most {SHARED_LIMIT}")
        if self.mma_sync:
            broken.append(f"{self.mma_sync} mma.sync instructions")
        if self.product and not (self.wgmma and self.tma):
            broken.append(f"{self.wgmma} wgmma and {self.tma} TMA instructions: expected some of both")
        return broken


def triton_kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int], bool]]:
    """(variant, kernel, types of arguments, constants, launch options, has a product), at the production tiles."""
    from megatron_laser.ops import IGNORE_LABEL
    from megatron_laser.ops.triton import few_rows as triton_few_rows
    from megatron_laser.ops.triton import fused as triton_fused
    from megatron_laser.ops.triton import merge, tile_kernels

    pointers = {"labels": "*i64", "kept": "*bf16"}
    options = {"num_warps": tile_kernels.WARPS}
    for entropy in (False, True):
        for keep, first in ((False, False), (True, True), (True, False)):
            constants = {"ENTROPY": entropy, "KEEP": keep, "FIRST": first, "BLOCK": tile_kernels.BLOCK}
            variant = _words(entropy=entropy, keep=keep, first=first)
            yield variant, tile_kernels.tile_statistics, pointers, constants, options, False
        for kept in (False, True):
            constants = {"ENTROPY": entropy, "KEPT": kept, "BLOCK": tile_kernels.BLOCK}
            types = {"labels": "*i64", "z": "*bf16" if kept else "*fp32", "out": "*bf16"}
            yield (
                _words(entropy=entropy, kept=kept),
                tile_kernels.tile_gradient,
                types,
                constants,
                options,
                False,
            )
        tile = triton_fused.PRODUCTION_TILE
        constants = {
            "ENTROPY": entropy,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "GROUP": tile.group,
            "WIDEN": False,
        }
        types = _descriptors(tile.rows, tile.columns, tile.depth)
        options_of_tile = {"num_warps": tile.warps, "num_stages": tile.stages}
        yield _words(entropy=entropy), triton_fused.fused_statistics, types, constants, options_of_tile, True
    for few in triton_few_rows.TILES:
        constants = {"ROWS": few.rows, "COLUMNS": few.columns, "DEPTH": few.depth, "WIDEN": False}
        types = _descriptors(few.rows, few.columns, few.depth)
        options_of_tile = {"num_warps": few.warps, "num_stages": few.stages}
        yield f"{few.rows} rows", triton_few_rows.few_row_statistics, types, constants, options_of_tile, True
    for parts in (8, 256):  # ranks, programs
        constants = dict(zip(("PARTS", "ROWS"), merge.block_of(parts)))
        for entropy in (False, True):
            variant = _words(**{f"{parts} parts": True, "entropy": entropy})
            yield variant, merge.merge_partials, {}, constants | {"ENTROPY": entropy}, {}, False
        constants |= {"NO_LABEL": IGNORE_LABEL}
        yield f"{parts} parts", merge.finish_partials, {"labels": "*i64"}, constants, {}, False
    types = {"hidden": "*bf16", "positions": "*i64", "out": "*bf16", "nothing": "fp32"}
    yield "", merge.pick_rows, types, {"WIDTH": merge.WIDTH}, {}, False


def _words(**flags: bool) -> str:
    return ", ".join(name for name, on in flags.items() if on)


def _descriptors(rows: int, columns: int, depth: int) -> dict[str, str]:
    return {
        "labels": "*i64",
        "hidden": f"tensordesc<bf16[{rows}, {depth}]>",
        "weight": f"tensordesc<bf16[{columns}, {depth}]>",
    }


SIZES = (
    *(
        "first_column",
        "columns",
        "z_stride",
        "kept_stride",
        "out_stride",
        "rows",
        "hidden_size",
    ),
    *("column_tiles", "row_blocks", "splits", "tiles_per_split"),
    *("parts", "field_stride", "part_stride", "vocab_size", "first", "tokens", "all_tokens", "stride"),
)


def inspect_triton() -> Iterator[Report]:
    """One report per Triton kernel and variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for variant, kernel, types, constants, options, product in triton_kernels():
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(name, "i32" if name in SIZES else "fp32" if name == "margin" else "*fp32")
            for name in kernel.arg_names
        }
        # What the launcher finds out by itself: pointers and row strides are multiples of 16.
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name.endswith("_stride") or name == "hidden_size"
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.TemporaryDirectory() as scratch:
            cubin = Path(scratch) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        name = kernel.fn.__name__
        yield Report(
            name,
            variant,
            product,
            _number(r"REG:(\d+)", usage),
            int(compiled.metadata.shared),
            _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
            compiled.asm["ptx"].count("wgmma.mma_async"),
            compiled.asm["ptx"].count("mma.sync"),
            compiled.asm["ptx"].count("cp.async.bulk.tensor"),
        )


def inspect_cuda() -> Iterator[Report]:
    """One report per CUDA C++ kernel. Raises BuildError without a compiler."""
    from megatron_laser.ops.cuda.build import compile_kernel
    from megatron_laser.ops.cuda.plan import every_plan

    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        messages = compile_kernel(cubin)
        instructions = _tool("cuobjdump", "-sass", str(cubin))
    for plan in every_plan():
        name = plan.name
        used = messages.split(f"Function properties for {name}\n")[1]
        body = re.split(r"Function : ", instructions.split(f"Function : {name}\n")[1])[0]
        stack = sum(
            int(number) for number in re.findall(r"(\d+) bytes (?:stack|spill)", used.split("Used")[0])
        )
        yield Report(
            "few_row_pairs (CUDA)" if plan.pairs else "few_row_logprob (CUDA)",
            f"{plan.rows} rows" + (f", {plan.columns} columns" if plan.pairs else ""),
            True,
            _number(r"Used (\d+) registers", used),
            plan.shared_bytes,
            stack,
            len(re.findall(r"\bHGMMA\b", body)),
            len(re.findall(r"\bHMMA\b", body)),
            len(re.findall(r"\bUTMALDG\b", body)),
        )


def _tool(name: str, *arguments: str) -> str:
    from triton.backends.nvidia import compiler

    tool = Path(compiler.__file__).with_name("bin") / name
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the compiler's output:\n{text[:2000]}")
    return int(found.group(1))


def main() -> None:
    """Print all reports; exit status 1 when one breaks a rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    from megatron_laser.ops.cuda.build import BuildError

    reports = list(inspect_triton())
    try:
        reports += inspect_cuda()
    except BuildError as error:
        print(f"the CUDA C++ kernel is left out: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps([asdict(report) | {"broken_rules": report.broken_rules()} for report in reports]))
    else:
        print(
            f"{'kernel':24s} {'variant':14s} {'registers':>9s} {'shared B':>9s} {'stack B':>8s} "
            f"{'wgmma':>6s} {'mma.sync':>9s} {'TMA':>4s}"
        )
        for one in reports:
            print(
                f"{one.kernel:24s} {one.variant:14s} {one.registers:9d} {one.shared_bytes:9d} {one.stack_bytes:8d} "
                f"{one.wgmma:6d} {one.mma_sync:9d} {one.tma:4d}"
            )
    broken = [f"{one.kernel} {one.variant}: {text}" for one in reports for text in one.broken_rules()]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()

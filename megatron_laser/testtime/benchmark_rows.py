"""A benchmark's problems and references, as its verifier needs them."""

from __future__ import annotations

from megatron_laser.config import Benchmark
from megatron_laser.data import Row, heed, look_at_references, read_rows
from megatron_laser.rewards import is_math_verify


def benchmark_rows(benchmark: Benchmark, *, look: bool = False) -> list[Row]:
    """Read its file.

    Args:
        look: whether responses can equal the references; warnings are logged.

    Raises:
        DataError: the file does not fit, or (`look`) no response can equal most references.
    """
    mathematics = is_math_verify(benchmark.reward)
    rows = read_rows(
        benchmark.path,
        prompt_key=benchmark.prompt_key,
        answer_key=benchmark.answer_key,
        mathematics=mathematics,
    )
    if look and mathematics:
        heed(look_at_references(rows, name=benchmark.name, ask_grader=False))
    return rows

"""Which form of the few-row kernel a shape gets, and how wide its tiles are: a model of its time. Pure.

Tiles of the weight go round by round to the multiprocessors. A round lasts as long as the slowest of: its part of the
weight from memory (one multiprocessor alone takes in a limited rate), the weight and the hidden rows out of L2, the
products. The last round is shorter where fewer tiles are left, but no multiprocessor gets faster then.

The weight-left form (few_row_logprob.cu) has tiles of 256 columns: 75 for a shard of 19008, so 57 of 132
multiprocessors idle, and 128 rows take 56 us of products where reading the shard takes 45. The pairs
(few_row_pairs.cu) cut it into 132 x 144: 31 us of products. Without pairs each multiprocessor would read all hidden
rows, 368 MB in all, out of L2; pairs halve the hidden rows' part.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

WEIGHT_LEFT_ROWS, WEIGHT_LEFT_COLUMNS = (16, 32, 64, 128), 256
PAIR_ROWS, PAIR_COLUMNS = (64, 128), (96, 128, 144, 192, 256)
MAX_ROWS = 128
# Bytes per second. L2's rate is what products without multicast are seen to need at 600
# TFLOP/s; the rate of one multiprocessor is its copy engine's with the ring full. Predictions, all of them.
L2, ONE_MULTIPROCESSOR = 7e12, 65e9
# Seconds after the last product of a program: 256 columns of each row across lanes, or N / 4 of them inside a thread.
EPILOGUE_WEIGHT_LEFT, EPILOGUE_PAIRS = 4.9e-6, 1e-6
# Pairs have to be faster by this factor: clusters are more to go wrong.
MARGIN = 1.05


class Rates(NamedTuple):
    """Bytes per second of a device's memory, operations per second of one of its multiprocessors."""

    memory: float
    product: float


H200 = Rates(4.3e12, 790e12 / 132)


class Plan(NamedTuple):
    """pairs: few_row_pairs.cu, else few_row_logprob.cu; for `rows` hidden rows, `columns` of the weight per tile."""

    pairs: bool
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """The kernel's name in the cubin."""
        return f"few_row_pairs_{self.rows}_{self.columns}" if self.pairs else f"few_row_logprob_{self.rows}"

    @property
    def threads(self) -> int:
        """Threads of a program: a producer warpgroup and one or two consumer warpgroups."""
        return 128 + 2 * self.rows if self.pairs else 384

    @property
    def hidden_box(self) -> int:
        """Hidden rows that one copy brings: each program of a pair copies half of them for both."""
        return self.rows // 2 if self.pairs else self.rows

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: `Layout<rows>::TOTAL_BYTES` or `PairLayout<rows, columns>::TOTAL_BYTES`."""
        stage = (self.columns + self.rows) * 128
        if self.pairs:
            return 1024 + min(8, (227 * 1024 - 1024) // (stage + 16)) * (stage + 16)
        stages = 5 if self.rows <= 64 else 4
        return 1024 + stages * stage + 17 * self.rows * 4 + 2 * stages * 8

    def tiles(self, columns: int) -> int:
        """Tiles of a shard."""
        return -(-columns // self.columns)

    def programs(self, columns: int, multiprocessors: int) -> int:
        """At most one for each multiprocessor; pairs come in twos."""
        tiles = self.tiles(columns)
        if self.pairs:
            return min(tiles + tiles % 2, multiprocessors - multiprocessors % 2)
        return min(tiles, multiprocessors)

    def rounds(self, columns: int, multiprocessors: int) -> int:
        """Tiles of the busiest program."""
        return -(-self.tiles(columns) // self.programs(columns, multiprocessors))

    def reading(self, columns: int, multiprocessors: int, hidden_size: int, rates: Rates = H200) -> float:
        """Predicted seconds of all rounds, without the kernel's start and end."""
        weight, hidden = self.columns * hidden_size * 2, self.rows * hidden_size * 2
        from_l2 = weight + (hidden / 2 if self.pairs else hidden)
        product = 2 * self.rows * self.columns * hidden_size / rates.product

        def one_round(busy: int) -> float:
            return max(
                busy * weight / rates.memory, weight / ONE_MULTIPROCESSOR, busy * from_l2 / L2, product
            )

        full, rest = divmod(self.tiles(columns), self.programs(columns, multiprocessors))
        return full * one_round(self.programs(columns, multiprocessors)) + (one_round(rest) if rest else 0.0)

    def seconds(self, columns: int, multiprocessors: int, hidden_size: int) -> float:
        """Predicted time of the kernel on an H200, by which forms and widths are compared."""
        epilogue = EPILOGUE_PAIRS if self.pairs else EPILOGUE_WEIGHT_LEFT
        return self.reading(columns, multiprocessors, hidden_size) + epilogue


def plans(rows: int) -> list[Plan]:
    """All kernels that take so many rows, each with its least padding."""
    left = next(size for size in WEIGHT_LEFT_ROWS if size >= rows)
    pair = next(size for size in PAIR_ROWS if size >= rows)
    return [
        Plan(False, left, WEIGHT_LEFT_COLUMNS),
        *(Plan(True, pair, columns) for columns in PAIR_COLUMNS),
    ]


@functools.lru_cache(maxsize=256)
def choose(rows: int, columns: int, multiprocessors: int, hidden_size: int) -> Plan:
    """The plan for 1 to 128 rows and a shard of `columns`; the weight-left form unless pairs are clearly faster."""
    left, *pairs = plans(rows)

    def order(plan: Plan) -> tuple[float, int, int]:
        # Of equal ones the fewest rounds, which ask least of L2, then the most programs.
        seconds = round(plan.seconds(columns, multiprocessors, hidden_size), 9)
        return seconds, plan.rounds(columns, multiprocessors), plan.columns

    best = min(pairs, key=order)
    times = [plan.seconds(columns, multiprocessors, hidden_size) for plan in (left, best)]
    return best if multiprocessors > 1 and times[0] > MARGIN * times[1] else left


def every_plan() -> list[Plan]:
    """Every kernel of the cubin."""
    return [
        *(Plan(False, rows, WEIGHT_LEFT_COLUMNS) for rows in WEIGHT_LEFT_ROWS),
        *(Plan(True, rows, columns) for columns in PAIR_COLUMNS for rows in PAIR_ROWS),
    ]

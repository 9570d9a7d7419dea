"""Predicts the time of the log-prob op from its operations and bytes; nothing is measured, and no GPU is needed.

    python tools/predict_kernels.py [--json | --markdown] [--device H200] [--terms]

A call is its products, at the rate of one large product and with the partly filled waves of `ops/slices.py`, plus its
memory-bound kernels, at a share of the rate of a copy, plus gaps between launches. The constants are in
`tools/kernel_model/`; two of them are guesses (`EXPOSED` and `EPILOGUE`) that a profile would replace. Expect +-5 %: a
table to be set beside measurements. --terms adds each term's milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from kernel_model.devices import DEVICES, FEW_ROW_SHAPES, SHAPES  # noqa: E402
from kernel_model.few_rows import few_rows  # noqa: E402
from kernel_model.training import predictions  # noqa: E402

COLUMNS = (
    "device",
    "shape",
    "variant",
    "forward_ms",
    "backward_ms",
    "sum_ms",
    "sum_over_3_products",
    "extra_gb",
    "target",
)
FEW_ROW_COLUMNS = (
    *(
        "device",
        "shape",
        "variant",
        "read_ms",
        "kernel_ms",
        "finish_ms",
        "collectives_ms",
        "host_ms",
        "call_ms",
    ),
    "call_over_read",
)


def table(
    rows: list[dict[str, Any]], columns: Sequence[str], *, markdown: bool, terms: bool = False
) -> list[str]:
    """Lines for people, or a table of a page; terms: each row's terms below it."""
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    head = [column.replace("_", " ").replace("over", "/") for column in columns]
    if markdown:
        return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]]
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *cells]]
    for number, row in enumerate(rows if terms else [], start=1):
        for part in ("forward", "backward"):
            parts = ", ".join(f"{name} {value:.2f}" for name, value in row[f"{part}_terms_ms"].items())
            lines[number] += f"\n    {part}: {parts}"
    return lines


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=[device.name for device in DEVICES])
    parser.add_argument("--json", action="store_true", help="a JSON line for each prediction")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/kernels.md")
    parser.add_argument("--terms", action="store_true", help="each term's milliseconds, too")
    arguments = parser.parse_args()
    devices = [device for device in DEVICES if arguments.device in (None, device.name)]
    found = [one.row() for device in devices for shape in SHAPES for one in predictions(device, shape)]
    few = [one.row() for device in devices for shape in FEW_ROW_SHAPES for one in few_rows(device, shape)]
    if arguments.json:
        print("\n".join(json.dumps(row) for row in [*found, *few]))
        return
    if arguments.markdown:
        found = [row for row in found if row["target"] or "main_grad" not in row["variant"]]
    for rows, columns in ((found, COLUMNS), (few, FEW_ROW_COLUMNS)):
        print(
            "\n".join(
                table(rows, columns, markdown=arguments.markdown, terms=arguments.terms and rows is found)
            )
        )
        print()


if __name__ == "__main__":
    main()

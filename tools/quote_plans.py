#!/usr/bin/env python
"""Write what `megatron-laser plan` says of each recipe's layout into the recipes' READMEs.

A block of console text whose first line is `$ megatron-laser plan ... --as-configured ...` is run again, and its table
of phases replaced.

python tools/quote_plans.py            # write them
python tools/quote_plans.py --check    # exit status 1 when one is not up to date
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from contextlib import chdir
from pathlib import Path

from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_laser.cli import app  # noqa: E402

COMMAND = "python tools/quote_plans.py"
_BLOCK = re.compile(
    r"^```console\n\$ megatron-laser (plan [^\n]*--as-configured[^\n]*)\n.*?^```$", re.M | re.S
)


def readmes() -> list[Path]:
    """Of all examples."""
    return sorted((ROOT / "examples").glob("*/README.md"))


def rewritten(text: str) -> tuple[str, int]:
    """`text` with its blocks run again, and how many there are."""
    return _BLOCK.subn(lambda found: _block(found[1]), text)


def _block(command: str) -> str:
    with chdir(ROOT):
        done = CliRunner().invoke(app, shlex.split(command))
    if done.exit_code:
        raise SystemExit(f"megatron-laser {command}: exit status {done.exit_code}\n{done.output}")
    lines = done.output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("as configured: "))
    table = lines[start : lines.index("", start)]
    return "\n".join(["```console", f"$ megatron-laser {command}", *table, "...", "```"])


def main() -> int:
    """Write or check the READMEs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    options = parser.parse_args()
    stale = 0
    for path in readmes():
        text = path.read_text(encoding="utf-8")
        new, _ = rewritten(text)
        if new == text:
            continue
        stale += 1
        if options.check:
            print(f"{path} is not up to date: run `{COMMAND}`", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())

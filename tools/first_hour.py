"""Runs a page of commands as it is written: by default docs/first_hour.md, in a fresh clone of this repository.

    python tools/first_hour.py                      # clones, runs every command, compares what is printed; half an hour
    python tools/first_hour.py --here               # in this folder instead of a clone
    python tools/first_hour.py --here --from 5      # from the fifth block on, where those before have run

A block marked `bash` is a command, run by bash with `.venv` activated where there is one. A block marked `console` that
follows shows what must be among its output, line by line and in this order; `…` stands for anything. In the comments

    # Ctrl-C at step N        sends SIGINT to all that was started, as a terminal does, at the line of that step
    # exits with N            is the status that the block has to end with; otherwise 0

Ends with 1 at the first block that does something else, after its output. Prints the seconds of each block and of all.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(bash|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INTERRUPT = re.compile(r"# Ctrl-C at step (\d+)")
_STATUS = re.compile(r"# exits with (\d+)")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PATIENCE = 900.0


@dataclass(frozen=True)
class Block:
    """A block of commands, the step at which it is interrupted, its exit status, and lines of its output."""

    command: str
    interrupt: int | None
    status: int
    shown: tuple[str, ...]


class Differs(Exception):
    """A block did something else than the page says."""


def read_blocks(text: str) -> list[Block]:
    """The blocks of a page, in its order."""
    blocks: list[Block] = []
    for kind, content in _FENCE.findall(text):
        if kind == "bash":
            interrupt, status = _INTERRUPT.search(content), _STATUS.search(content)
            blocks.append(
                Block(content, int(interrupt[1]) if interrupt else None, int(status[1]) if status else 0, ())
            )
        else:
            last = blocks.pop()
            lines = tuple(line for line in content.splitlines() if line.strip() not in ("", "…"))
            blocks.append(Block(last.command, last.interrupt, last.status, last.shown + lines))
    return blocks


def missing_line(shown: tuple[str, ...], output: str) -> str | None:
    """The first of the `shown` lines that `output` does not have behind the one before it; None: all are there."""
    lines = iter([_plain(line) for line in output.splitlines()])
    for wanted in shown:
        pattern = re.compile(".*".join(re.escape(part) for part in _plain(wanted).split("…")))
        if not any(pattern.search(line) for line in lines):
            return wanted
    return None


def run_block(block: Block, folder: Path) -> tuple[str, int]:
    """What it prints, and its exit status. Raises Differs when it does not end in time."""
    activated = "[ ! -f .venv/bin/activate ] || . .venv/bin/activate\n"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    with tempfile.NamedTemporaryFile("w") as file:
        printed = Path(file.name)
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", activated + block.command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            until, asked = time.monotonic() + _PATIENCE, False
            while process.poll() is None:
                if time.monotonic() > until:
                    raise Differs(f"still running after {_PATIENCE:g} s\n{_read(printed)}")
                if block.interrupt is not None and not asked and _at_step(block.interrupt, _read(printed)):
                    os.killpg(process.pid, signal.SIGINT)
                    asked = True
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return _read(printed), process.returncode


def check_block(block: Block, folder: Path) -> str:
    """Run it and return what it printed. Raises Differs."""
    output, status = run_block(block, folder)
    if status != block.status:
        raise Differs(f"{output}\nended with {status}, expected {block.status}")
    if (wanted := missing_line(block.shown, output)) is not None:
        raise Differs(f"{output}\nexpected this line in its place:\n{wanted}")
    return output


def _plain(line: str) -> str:
    return " ".join(_COLOURS.sub("", line).split())


def _at_step(step: int, output: str) -> bool:
    steps = re.findall(r"^step +(\d+)", _COLOURS.sub("", output), re.MULTILINE)
    return any(int(found) >= step for found in steps)


def _read(printed: Path) -> str:
    return printed.read_text(encoding="utf-8", errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "docs" / "first_hour.md")
    parser.add_argument("--here", action="store_true", help="run in this folder instead of a fresh clone")
    parser.add_argument(
        "--folder", type=Path, help="clone to this folder, which must not exist, and leave it there"
    )
    parser.add_argument("--from", dest="first", type=int, default=1, help="number of the first block, from 1")
    arguments = parser.parse_args()
    blocks = read_blocks(arguments.page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = ROOT if arguments.here else (arguments.folder or Path(temporary) / "clone")
        if not arguments.here:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        started = time.monotonic()
        for number, block in enumerate(blocks[arguments.first - 1 :], arguments.first):
            begun = time.monotonic()
            print(f"[{number}/{len(blocks)}] {block.command.strip()}", flush=True)
            try:
                output = check_block(block, folder)
            except Differs as error:
                print(error)
                print(f"block {number} of {arguments.page}: not as written")
                return 1
            print(output + f"--- {time.monotonic() - begun:.0f} s\n", flush=True)
        print(f"all {len(blocks)} blocks as written, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

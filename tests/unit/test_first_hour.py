"""tools/first_hour.py runs a page of commands as it is written; docs/first_hour.md is such a page."""

import sys

import pytest
from helpers.source_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from first_hour import Differs, check_block, missing_line, read_blocks

from megatron_laser.cli import app

COUNTS = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (print("stopped", flush=True), sys.exit(3)))
for step in range(1, 1000):
    print(f"step {step}", flush=True)
    time.sleep(0.05)
"""


def test_blocks_are_read_with_what_they_show_and_how_they_end():
    page = """Text.

```bash
a  # Ctrl-C at step 7, exits with 3 after that
b  # exits with 3
```

and

```console
one …

…
two
```

```yaml
not: run
```

```bash
c
```
"""
    first, second = read_blocks(page)
    assert (first.interrupt, first.status, first.shown) == (7, 3, ("one …", "two"))
    assert (second.command, second.interrupt, second.status, second.shown) == ("c\n", None, 0, ())


@pytest.mark.parametrize(
    ("output", "missing"),
    [
        ("one 1\nbetween\n  two\n", None),
        ("two\none 1\n", "two"),
        ("one 1\ntw o\n", "two"),
        ("\x1b[1mone\x1b[0m   1\ntwo", None),
        ("", "one …"),
    ],
)
def test_lines_have_to_come_in_their_order(output, missing):
    assert missing_line(("one …", "two"), output) == missing


def test_a_command_is_interrupted_at_its_step_and_has_to_end_as_it_is_written(tmp_path):
    (tmp_path / "counts.py").write_text(COUNTS)
    command = f"{sys.executable} counts.py  # Ctrl-C at step 3\n# exits with 3\n"
    (block,) = read_blocks(f"```bash\n{command}```\n```console\nstep 3\nstopped\n```\n")
    assert "step 40" not in check_block(block, tmp_path)
    (wrong,) = read_blocks("```bash\necho done\n# exits with 3\n```\n")
    with pytest.raises(Differs, match="ended with 0, expected 3"):
        check_block(wrong, tmp_path)
    (silent,) = read_blocks("```bash\necho done\n```\n```console\nready\n```\n")
    with pytest.raises(Differs, match=r"expected this line in its place:\nready"):
        check_block(silent, tmp_path)


def test_the_pages_commands_and_options_exist():
    """The page itself is run by tests/long/test_first_hour_whole.py."""
    page = (ROOT / "docs" / "first_hour.md").read_text(encoding="utf-8")
    blocks = read_blocks(page)
    assert len(blocks) > 10 and any(block.interrupt for block in blocks)
    lines = [line.split() for block in blocks for line in block.command.splitlines()]
    called = {words[1] for words in lines if words[:1] == ["megatron-laser"]}
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    assert called - known == {"--version"}

"""docs/first_hour.md as a reader would follow it, from a fresh clone on."""

import subprocess
import sys

import pytest
from helpers.source_tree import ROOT

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.mark.timeout(2400)
def test_every_command_of_the_page_does_what_it_says(tmp_path):
    command = [sys.executable, "tools/first_hour.py", "--folder", str(tmp_path / "clone")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "blocks as written" in done.stdout

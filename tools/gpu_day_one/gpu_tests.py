"""Stage `tests`: the tests that need a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu_day_one.stage import Stage

_ROOT = Path(__file__).resolve().parents[2]
# The offload stage has the GPU to itself and runs that test's claim on a whole trainer.
_FILES = ("tests/gpu/test_logprob_gpu.py", "tests/unit/test_step_memory.py")


def run(stage: Stage) -> None:
    """pytest -m gpu; in a rehearsal it collects them and skips, which shows that they import."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", *_FILES]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = next((line for line in reversed(lines) if " in " in line), (done.stderr or "nothing")[-300:])
    stage.note("pytest", status=done.returncode, summary=summary, failures=failures[:40])
    if done.returncode:
        raise SystemExit(f"pytest ended with exit status {done.returncode}: {summary}")

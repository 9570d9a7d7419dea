"""Starting a worker script under torchrun, with a deadline and an output that shows what went wrong."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FAILURE = "=== failure on rank"


def torchrun(script: Path, processes: int, *arguments: str | Path, timeout: float = 150.0) -> str:
    """Run `script` on `processes` gloo ranks of this machine; returns their output.

    The script should call `run_worker`. Raises AssertionError with the failing ranks' tracebacks (or the end
    of the output), and after `timeout` seconds; nothing is left running.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun answers SIGTERM by ending its ranks, which would outlive a SIGKILL of torchrun alone.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        raise AssertionError(f"{script.name}: not done after {timeout:g} s\n{readable(output)}") from None
    assert process.returncode == 0, f"{script.name} failed on {processes} ranks\n{readable(output)}"
    return output


def worker_environment() -> dict[str, str]:
    """The environment of a child process: one thread, this repository and tests/ importable, no warnings."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Megatron sets NVTE_* for a model that was built in this process: in a child they would be the user's choice.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
    }


def run_worker(main: Callable[[], None]) -> None:
    """The last line of a worker script: a failure is printed in one piece, under its rank, and ends the rank.

    It exits without teardown: destroying process groups would wait for ranks that are not coming.
    """
    try:
        main()
    except BaseException:
        text = f"\n{_FAILURE} {os.environ.get('RANK')} ===\n{traceback.format_exc()}{_FAILURE}s end ===\n"
        os.write(2, text.encode())
        os._exit(1)


def readable(output: str) -> str:
    """The tracebacks that `run_worker` has written, or the end of the output."""
    failures = [part for part in output.split(_FAILURE) if part.startswith(" ") and "Traceback" in part]
    if failures:
        return "\n".join(_FAILURE + part[:5000] for part in failures)
    return output[-5000:]

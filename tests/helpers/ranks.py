"""Ranks that begin with torch, Megatron and this package imported: of a rank's seven seconds of CPU these take six.

They are forked from a process that has imported all that and done nothing else. torchrun itself is started where the
test is about it (helpers/torchrun.py, `start_run`).
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from helpers.pictures import unpainted
from helpers.torchrun import readable, worker_environment

_CONTEXT = multiprocessing.get_context("forkserver")
_COMMAND = Path(__file__).parents[1] / "distributed" / "command_worker.py"
_IMPORTED = ["megatron_laser.loop", "megatron_laser.trainer.trainer", "torch.distributed.checkpoint"]
_IMPORTED += ["transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.tokenization_auto"]
_IMPORTED += ["matplotlib.figure"]


class Rank:
    """A process that runs `script` with `arguments`, in a session of its own; its output goes to a file."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="rank-", suffix=".log")  # noqa: SIM115
        _CONTEXT.set_forkserver_preload(_IMPORTED)
        self._process = _CONTEXT.Process(
            target=_run, args=(str(script), arguments, environment, self._log.name)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has written so far, to stdout and stderr."""
        return Path(self._log.name).read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit status, or None while it runs; negative for a signal."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit status; raises AssertionError with its output after `timeout` seconds."""
        self._process.join(timeout)
        status = self.poll()
        assert status is not None, f"not done after {timeout:g} s\n{self.output[-5000:]}"
        return status

    def end(self) -> None:
        """Kill it and everything that it started."""
        if self.poll() is None:
            self._process.kill()  # before it has a session, that is all there is
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


def start_ranks(script: Path, processes: int, *arguments: str | Path) -> list[Rank]:
    """Start `script` on gloo ranks of this machine, or alone, as without torchrun; the caller ends each of them."""
    from helpers.sglang_server import free_port

    environment = worker_environment()
    if processes == 1:
        return [Rank(script, [*map(str, arguments)], environment)]
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [
        Rank(script, [*map(str, arguments)], environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def run_ranks(script: Path, processes: int, *arguments: str | Path, timeout: float = 150.0) -> str:
    """Run `script` on gloo ranks of this machine; returns their output.

    The script should call `run_worker`. Raises AssertionError with the failing ranks' tracebacks (or the end
    of the output) as soon as one of them fails, and after `timeout` seconds; nothing is left running.
    """
    ranks = start_ranks(script, processes, *arguments)
    until = time.monotonic() + timeout
    try:
        while (statuses := [rank.poll() for rank in ranks]).count(0) < processes:
            failed = any(statuses)
            if failed:
                time.sleep(2.0)  # the others may be about to say why
            if failed or time.monotonic() > until:
                output = readable("".join(rank.output for rank in ranks))
                what = (
                    f"failed on {processes} ranks ({statuses})" if failed else f"not done after {timeout:g} s"
                )
                raise AssertionError(f"{script.name}: {what}\n{output}")
            time.sleep(0.02)
        return "".join(rank.output for rank in ranks)
    finally:
        for rank in ranks:
            rank.end()


def train_on_ranks(file: Path, *overrides: str, processes: int = 1, timeout: float = 150.0) -> str:
    """`megatron_laser train FILE` on ranks of this machine; returns their output. As `run_ranks`."""
    return run_ranks(_COMMAND, processes, "train", file, *overrides, timeout=timeout)


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.path[:0] = [path for path in environment["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    with unpainted():
        runpy.run_path(script, run_name="__main__")

"""What long responses cost rank 0: seconds of its own threads, the event loop's longest pause, memory that is kept.

A fake server in a process of its own sends answers that were rendered before, as SGLang 0.5.23 writes them, with the
ids, log-probs and text of `tokens` tokens. `SglangEngine.generate` takes them all: one arm as it is, one that reads
long answers as short ones: `orjson`, Python lists and loops, on the event loop's thread. Each arm runs in a process
of its own, so that the memory of one is not the other's.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import multiprocessing
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import orjson

from megatron_laser.benchmarks.result import Result, aligned, provenance
from megatron_laser.rollout.client import http
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.types import SamplingParams

PLAIN, ARRAYS = "lists, in the event loop", "arrays, beside it"
VOCABULARY = 151_936
_BODIES = 16  # different answers, which take turns
_EVERY = 0.005  # seconds between two looks at the event loop
_DEADLINE = 3600.0


@dataclass(frozen=True)
class Cost:
    """Of one arm.

    Attributes:
        seconds: until all responses are there.
        loop_seconds, reader_seconds, other_seconds: CPU of the event loop's thread, of those that read answers, and of
            the rest of the process.
        longest_pause: seconds that the event loop answered nobody.
        kept: bytes of ids and log-probs. grown: bytes that the process had more at the end than before.
    """

    seconds: float
    loop_seconds: float
    reader_seconds: float
    other_seconds: float
    longest_pause: float
    kept: int
    grown: int

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of the process."""
        return self.loop_seconds + self.reader_seconds + self.other_seconds


@dataclass(frozen=True)
class RankZeroResult(Result):
    """costs: by arm."""

    responses: int
    tokens: int
    answer_bytes: int
    costs: dict[str, Cost]

    def table(self) -> str:
        """A table for people."""
        head = [
            "",
            "seconds",
            "CPU s",
            "loop",
            "readers",
            "others",
            "longest pause ms",
            "arrays GB",
            "grown GB",
        ]
        rows = [head]
        for arm, cost in self.costs.items():
            cpu = (cost.cpu_seconds, cost.loop_seconds, cost.reader_seconds, cost.other_seconds)
            memory = (f"{cost.kept / 1e9:.2f}", f"{cost.grown / 1e9:.2f}")
            pause = f"{cost.longest_pause * 1e3:.0f}"
            rows.append([arm, f"{cost.seconds:.1f}", *(f"{value:.2f}" for value in cpu), pause, *memory])
        return "\n".join(
            [
                f"{self.responses} responses x {self.tokens} tokens, answers of {self.answer_bytes / 1e6:.2f} MB; "
                f"{self.provenance.machine}",
                *aligned(rows),
            ]
        )


def bench_rank_zero(*, responses: int, tokens: int) -> RankZeroResult:
    """Receive `responses` answers of `tokens` tokens each in both ways."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, tokens), daemon=True)
    server.start()
    costs = {}
    try:
        url, size = ours.recv()
        for arm in (PLAIN, ARRAYS):
            mine, its = context.Pipe()
            process = context.Process(target=_measure, args=(its, url, arm, responses, tokens), daemon=True)
            process.start()
            its.close()  # so that a process that fails ends the wait
            costs[arm] = mine.recv()
            process.join()
    finally:
        server.kill()
        server.join()
    return RankZeroResult(provenance(), responses, tokens, size, costs)


def _measure(answer: Connection, url: str, arm: str, responses: int, tokens: int) -> None:
    if arm == PLAIN:
        http.MIN_BYTES = sys.maxsize
    engine = SglangEngine.connect([url], api_key=None, expected=Expected(VOCABULARY), deadline=60.0)
    try:
        sampling = SamplingParams(samples_per_prompt=1, max_new_tokens=tokens, stop_token_ids=(1,))
        engine.generate([[2, 3]] * 2, sampling, deadline=_DEADLINE)  # imports
        gc.collect()
        memory = _resident()
        pauses = asyncio.run_coroutine_threadsafe(_longest_pause(), engine.loop)
        cpu, started = _thread_seconds(), time.perf_counter()
        found = engine.generate([[2, 3]] * responses, sampling, deadline=_DEADLINE)
        seconds = time.perf_counter() - started
        loop, readers, others = (after - before for after, before in zip(_thread_seconds(), cpu))
        engine.loop.call_soon_threadsafe(_ended.set)
        pause = pauses.result()
        gc.collect()
        kept = sum(one.response_ids.nbytes + one.logprobs.nbytes for group in found for one in group)
        answer.send(Cost(seconds, loop, readers, others, pause, kept, _resident() - memory))
    finally:
        engine.close()


_ended = asyncio.Event()


async def _longest_pause() -> float:
    """How much later than asked the event loop woke up, at most."""
    longest = 0.0
    while not _ended.is_set():
        before = time.perf_counter()
        await asyncio.sleep(_EVERY)
        longest = max(longest, time.perf_counter() - before - _EVERY)
    return longest


def _thread_seconds() -> tuple[float, float, float]:
    """CPU so far of the event loop's thread, of those that read answers, and of the rest of this process."""
    known = {"rollout servers": 0.0, "rollout answers": 0.0}
    for thread in threading.enumerate():
        name = next((name for name in known if thread.name.startswith(name)), None)
        if name is not None and thread.ident is not None:
            known[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    loop, readers = known.values()
    return loop, readers, time.process_time() - loop - readers


def _resident() -> int:
    """Bytes of this process in memory, without what the C library keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def _serve(ready: Connection, tokens: int) -> None:
    """Answer until killed; tells its address and the bytes of an answer."""
    bodies = [_body(seed, tokens) for seed in range(_BODIES)]
    turns = itertools.cycle(bodies)
    info = {"weight_version": "default", "is_generation": True, "model_path": "m"}
    server = {"version": "0.5.23", "vocab_size": VOCABULARY}
    fixed = {b"/model_info": orjson.dumps(info), b"/server_info": orjson.dumps(server)}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                path = head.split(b" ", 2)[1]
                body = next(turns) if path == b"/generate" else fixed.get(path, b"{}")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
                writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def serve() -> None:
        listening = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        ready.send((f"http://127.0.0.1:{port}", len(bodies[0])))
        await listening.serve_forever()

    asyncio.run(serve())


def _body(seed: int, tokens: int) -> bytes:
    """An answer of `tokens` tokens, cut at the length limit; most log-probs near 0, as of a trained policy."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, tokens).tolist()
    logprobs = (-(rng.standard_normal(tokens).astype(np.float32) ** 6)).tolist()
    meta = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": tokens},
        "prompt_tokens": 2,
        "weight_version": "default",
        "input_token_logprobs": [],
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, ids)],
        "completion_tokens": tokens,
        "cached_tokens": 1,
    }
    return orjson.dumps({"text": "word " * tokens, "output_ids": ids, "meta_info": meta})

"""What our client costs: tokens per second through the engine, over a bare asyncio loop that posts the same requests.

The bare loop is what one would write for a measurement: aiohttp, a semaphore, the same JSON bodies, and a count of the
tokens that come back. It checks nothing, retries nothing and watches nobody. Our side is `SglangEngine.generate`:
server choice, deadlines, retries, checks of ids, log-probs and weight versions, fleet health. A third arm also scores
each response. All take turns on the same prompts, in an order that is reversed from round to round; a fresh set of
prompts each round, so that prefix caches help no arm more than another: one warm-up pass fills them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, groupby, islice
from operator import itemgetter

import aiohttp
import orjson

from megatron_laser.benchmarks.measure import median_ratio, turns
from megatron_laser.benchmarks.result import Result, aligned, provenance
from megatron_laser.config import (
    ConfigError,
    RunConfig,
    read_architecture,
    read_stop_token_ids,
    resolve_score_token,
)
from megatron_laser.config.readouts import score_token_setting
from megatron_laser.config.schema.sources import data_files
from megatron_laser.data import build_prompts, chat_options, read_rows
from megatron_laser.data.tokenizer import load_tokenizer
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.sampled_sets import sets_request
from megatron_laser.rollout.sglang_api import GENERATE, generate_body
from megatron_laser.run.engines import open_engine
from megatron_laser.types import SamplingParams

BARE, OURS, SCORED = "bare asyncio loop", "our client", "our client, with scores"
ARMS = (BARE, OURS, SCORED)


@dataclass(frozen=True)
class ClientBenchmarkResult(Result):
    """tokens_per_second by arm, one figure a round; a ratio is of two arms in one round, its interval of the median."""

    servers: int
    requests: int
    concurrency: int
    tokens: float
    tokens_per_second: dict[str, list[float]]
    score_time_fraction: float

    def ratio(self, arm: str, over: str) -> tuple[float, float, float]:
        """(median, low, high) of arm / over."""
        return median_ratio(self.tokens_per_second[arm], self.tokens_per_second[over])

    def table(self) -> str:
        """A table for people."""
        rows = [["", "median tok/s", "over the bare loop"]]
        for arm in ARMS:
            median, low, high = self.ratio(arm, BARE)
            ratio = "" if arm == BARE else f"{median:.3f} [{low:.3f}, {high:.3f}]"
            rows.append([arm, f"{statistics.median(self.tokens_per_second[arm]):.1f}", ratio])
        median, low, high = self.ratio(SCORED, OURS)
        return "\n".join(
            [
                f"{self.requests} requests a round, {self.tokens:.0f} tokens, {self.concurrency} open at once, "
                f"{len(self.tokens_per_second[BARE])} interleaved rounds; {self.servers} server(s), SGLang "
                f"{self.provenance.versions['sglang']}",
                *aligned(rows),
                f"scores cost {1 - median:.1%} of the tokens per second [{1 - high:.1%}, {1 - low:.1%}], and "
                f"{self.score_time_fraction:.1%} of the time that requests were open",
            ]
        )


def bench_client(config: RunConfig, *, rounds: int) -> ClientBenchmarkResult:
    """Time the arms on the servers, prompts and sampling of `config`, which must have rollout.engine: sglang.

    Servers that the configuration does not name are started, and stopped at the end. Raises as `open_engine` does.
    """
    rollout = config.rollout
    if rollout.sglang.quantization is not None:
        raise ConfigError(
            [
                "rollout.sglang.quantization: servers for FP8 weights have none before a run sends them, and a "
                "benchmark of the client sends none; use null"
            ]
        )
    prompts = _prompts(config)
    groups = rollout.prompts_per_step
    plain = SamplingParams(
        samples_per_prompt=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=tuple(rollout.stop_token_ids or read_stop_token_ids(config.model.path)),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
    )
    engine = open_engine(config)
    assert isinstance(engine, SglangEngine)
    try:
        facts = engine.identify_all()
        arms = _arms(engine, list(facts), config, plain)
        rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
        counts = []
        fraction = []
        stream = cycle(prompts)
        for number, of_round in groupby(turns(ARMS, rounds + 1), key=itemgetter(0)):
            batch = list(islice(stream, groups))
            # every arm finds the prompts in the cache
            engine.generate(batch, plain, deadline=rollout.deadline)
            for _, arm in of_round:
                engine.take_metrics()
                started = time.perf_counter()
                tokens = arms[arm](batch)
                seconds = time.perf_counter() - started
                if number:  # the first round is a warm-up
                    rates[arm].append(tokens / seconds)
                    counts.append(tokens)
                if arm == SCORED:
                    fraction.append(engine.take_metrics()["rollout/score_time_fraction"])
        return ClientBenchmarkResult(
            provenance(sglang=next(iter(facts.values())).sglang_version),
            servers=len(facts),
            requests=groups * rollout.samples_per_prompt,
            concurrency=rollout.max_concurrency_per_server * len(facts),
            tokens=statistics.mean(counts),
            tokens_per_second=rates,
            score_time_fraction=statistics.median(fraction),
        )
    finally:
        engine.close()


def _prompts(config: RunConfig) -> list[list[int]]:
    """The run's training prompts, as token ids."""
    data = config.data
    rows = read_rows(
        data_files(data.train), prompt_key=data.prompt_key, answer_key=data.answer_key, mathematics=False
    )
    built, _ = build_prompts(
        rows,
        load_tokenizer(config.model.path),
        prompt_suffix=data.prompt_suffix,
        apply_chat_template=data.apply_chat_template,
        options=chat_options(data),
        max_prompt_tokens=data.max_prompt_tokens,
        vocab_size=read_architecture(config.model.path).vocab_size,
    )
    return [prompt.token_ids for prompt in built]


def _arms(
    engine: SglangEngine, urls: Sequence[str], config: RunConfig, plain: SamplingParams
) -> dict[str, Callable[[Sequence[Sequence[int]]], int]]:
    """Each generates a batch of prompts and returns the number of tokens."""
    token = None
    setting = score_token_setting(config)
    if setting is not None:
        token = resolve_score_token(config.model.path, setting).id
    scoring = SamplingParams(**{**asdict(plain), "score_token_id": token})
    key, deadline = engine.api_key, config.rollout.deadline
    limit = config.rollout.max_concurrency_per_server * len(urls)

    def ours(batch: Sequence[Sequence[int]], sampling: SamplingParams) -> int:
        groups = engine.generate(batch, sampling, deadline=deadline)
        return sum(len(one.response_ids) for group in groups for one in group)

    return {
        BARE: lambda batch: engine.run(
            bare_loop(urls, batch, plain, api_key=key, concurrency=limit, deadline=deadline),
            deadline,
            "the bare loop",
        ),
        OURS: lambda batch: ours(batch, plain),
        SCORED: lambda batch: ours(batch, scoring),
    }


async def bare_loop(
    urls: Sequence[str],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    api_key: str | None,
    concurrency: int,
    deadline: float,
) -> int:
    """Post one request for each sample, prompts round-robin over `urls`; returns the number of tokens."""
    timeout = aiohttp.ClientTimeout(total=deadline)
    slots = asyncio.Semaphore(concurrency)
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

        async def one(url: str, ids: Sequence[int]) -> int:
            body = generate_body(ids, sampling, max_new_tokens=sampling.max_new_tokens, rid=uuid.uuid4().hex)
            body |= sets_request(sampling)
            async with (
                slots,
                session.post(url + GENERATE, data=orjson.dumps(body), timeout=timeout) as answer,
            ):
                answer.raise_for_status()
                return len(orjson.loads(await answer.read())["output_ids"])

        posts = [
            one(urls[row % len(urls)], ids)
            for row, ids in enumerate(prompts)
            for _ in range(sampling.samples_per_prompt)
        ]
        return sum(await asyncio.gather(*posts))

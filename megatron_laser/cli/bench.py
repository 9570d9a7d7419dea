"""The commands `bench ...`. Heavy imports happen inside them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from megatron_laser.cli.options import ConfigFile, Overrides, SetFiles, prepare_process

app = typer.Typer(help="Measure: each command prints a table.", no_args_is_help=True)


def _prepare_process(level: str = "WARNING") -> None:
    # Read when torch is imported: its profiler, which counts memory on a CPU, else writes a line for every measurement.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prepare_process(level, is_main=True)


@app.command("step")
def bench_step(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds that are counted.", min=1)] = 30,
    prompts: Annotated[int, typer.Option(help="Prompts per step.")] = 4,
    samples: Annotated[int, typer.Option(help="Responses per prompt.")] = 8,
    response_length: Annotated[int, typer.Option(help="Tokens of each response.")] = 256,
    hidden: Annotated[int, typer.Option(help="Hidden size of the random Qwen2 model.")] = 128,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Its vocabulary.")] = 8192,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """What LaSeR adds to a GRPO train step, and what scores from the servers save of it: time and peak memory."""
    _prepare_process()
    from megatron_laser.model.transformer_engine import settle

    settle("torch")
    from megatron_laser.benchmarks.step import StepBenchmark

    benchmark = StepBenchmark(
        prompts=prompts,
        samples=samples,
        response_length=response_length,
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
    )
    result = benchmark.run(rounds)
    typer.echo(result.table())
    if output is not None:
        result.write_json(output)


@app.command("logprob")
def bench_logprob(
    output: Annotated[
        Path | None, typer.Option(help="Folder for logprob.jsonl, logprob.json and logprob.png.")
    ] = None,
) -> None:
    """The log-prob op forward and backward: time over the device's measured ceiling, peak memory, other libraries."""
    _bench("logprob", output)


@app.command("score")
def bench_score(
    output: Annotated[
        Path | None, typer.Option(help="Folder for score.jsonl, score.json and score.png.")
    ] = None,
) -> None:
    """The few-row op that computes self-reward scores: time over one read of the output layer's weight."""
    _bench("score", output)


def _bench(name: str, output: Path | None) -> None:
    _prepare_process()
    from megatron_laser.benchmarks import logprob
    from megatron_laser.benchmarks.logprob_report import Lines, Measurement
    from megatron_laser.benchmarks.result import provenance

    lines = None if output is None else Lines(output / f"{name}.jsonl", provenance())

    def listen(one: Measurement) -> None:
        typer.echo(f"{one.shape!s:34s} {one.line().strip()}", err=True)
        if lines is not None:
            lines.add(one)

    bench = logprob.bench_logprob if name == "logprob" else logprob.bench_score
    # Each line as it comes: what a kernel that hangs or takes the process down would lose is the rest.
    report = bench(listener=listen)
    typer.echo(report.table())
    if output is not None:
        for file in report.write(output, name):
            typer.echo(f"wrote {file}")
    if report.wrong:
        typer.echo("wrong: " + "; ".join(one.note for one in report.wrong), err=True)
        raise typer.Exit(1)


@app.command("client")
def bench_client(
    config: ConfigFile,
    overrides: Overrides = None,
    set_files: SetFiles = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds that are counted.", min=1)] = 20,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """What our rollout client costs: tokens per second over a bare asyncio loop that posts the same requests.

    Servers, prompts and sampling are those of a run's YAML file with rollout.engine: sglang; servers that run already:
    rollout.sglang.urls=[...].

    On a machine without a GPU: megatron-laser bench client examples/tiny_sum/laser_sglang.yaml
    """
    from megatron_laser.config import ConfigError, load_config

    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_config(config, [*(overrides or []), f"run.output_dir={scratch}"], set_files or [])
        if loaded.rollout.engine != "sglang":
            raise ConfigError([f"{config}: rollout.engine is {loaded.rollout.engine}; expected sglang"])
        _prepare_process()
        from megatron_laser.benchmarks.client import bench_client as run

        result = run(loaded, rounds=rounds)
        typer.echo(result.table())
        if output is not None:
            result.write_json(output)


@app.command("memory")
def bench_memory(
    config: ConfigFile,
    overrides: Overrides = None,
    set_files: SetFiles = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """What a training step allocates on a CPU beside what the dry run says, phase by phase; under torchrun, too.

    One real step on random rollouts of the greatest lengths, for which the run's data and engine are not needed; under
    torchrun on as many ranks as the layout has: torchrun --nproc-per-node 2 -m megatron_laser bench memory RUN.yaml
    """
    from megatron_laser.config import load_config

    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_config(config, [*(overrides or []), f"run.output_dir={scratch}"], set_files or [])
        _prepare_process()
        from megatron_laser.model.transformer_engine import settle

        settle("torch")
        from megatron_laser.benchmarks.memory import bench_memory as run

        result = run(loaded)
        if result is None:
            return
        typer.echo(result.table())
        if output is not None:
            result.write_json(output)


@app.command("prompts")
def bench_prompts(
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder; default: a random model of 7M.")
    ] = None,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            "--length", help="PROMPT:RESPONSE in tokens; several times.  [default: 128:128, 137:17, 32:256]"
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts per step.", min=1)] = 8,
    samples: Annotated[int, typer.Option(help="Responses per prompt.", min=2)] = 8,
    budget: Annotated[int, typer.Option(help="Tokens of a micro-batch.", min=1)] = 2048,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds that are counted.", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """What a group's prompt, and what all prompts begin with, save of a train step and generation if computed once."""
    pairs = []
    for text in lengths or ["128:128", "137:17", "32:256"]:
        prompt, _, response = text.partition(":")
        if not (prompt.isdigit() and response.isdigit() and int(prompt) > 1 and int(response) > 1):
            raise typer.BadParameter(f"{text!r}: expected PROMPT:RESPONSE, 2 tokens or more each")
        pairs.append((int(prompt), int(response)))
    longest = sum(map(max, zip(*pairs)))
    if longest > budget:
        raise typer.BadParameter(
            f"the longest prompt and response have {longest} tokens, more than --budget {budget}"
        )
    _prepare_process()
    from megatron_laser.model.transformer_engine import settle

    settle("torch")
    from megatron_laser.benchmarks.shared_prompts import bench_shared_prompts

    result = bench_shared_prompts(
        model, samples=samples, prompts=prompts, lengths=pairs, rounds=rounds, budget=budget
    )
    typer.echo(result.table())
    if output is not None:
        result.write_json(output)


@app.command("rank-zero")
def bench_rank_zero(
    responses: Annotated[int, typer.Option(help="Responses of a step.", min=1)] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 32_768,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """What receiving a step's long responses costs rank 0: CPU of its threads, pauses of its event loop, memory.

    No server is needed: a process of its own sends answers that were rendered before.
    """
    _prepare_process()
    from megatron_laser.benchmarks.rank_zero import bench_rank_zero as run

    result = run(responses=responses, tokens=tokens)
    typer.echo(result.table())
    if output is not None:
        result.write_json(output)

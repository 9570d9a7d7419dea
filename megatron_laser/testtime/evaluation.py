"""`megatron-laser eval`: benchmarks on any engine, resumable, to results.json, report.md and plots."""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laser.config import Benchmark
from megatron_laser.data import build_prompts, fingerprint, read_ids, refuse_score_token
from megatron_laser.evaluation import evaluate, evaluation_detail, read_records
from megatron_laser.observability.benchmark_report import write_benchmark_report
from megatron_laser.observability.plain import plain, write_atomically
from megatron_laser.rewards import GradingPool, try_reward
from megatron_laser.rollout.engine import RolloutEngine, takes_seeds
from megatron_laser.testtime.benchmark_rows import benchmark_rows
from megatron_laser.testtime.engine import EngineChoice, open_engine
from megatron_laser.testtime.errors import TestTimeError
from megatron_laser.testtime.model_folder import ModelFolder
from megatron_laser.testtime.progress import Progress
from megatron_laser.types import Prompt, SamplingParams

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_RESPONSES = "responses.jsonl"
_RECORDS = "records.jsonl"
# These change what the responses are worth, not the responses: the records are made anew from them.
_JUDGING = ("ref_logprob", "beta", "targets", "reward")


def evaluate_benchmarks(
    model: ModelFolder,
    benchmarks: Sequence[Benchmark],
    choice: EngineChoice,
    output: Path,
    *,
    deadline: float,
    workers: int = 2,
    grading_deadline: float = 5.0,
    regrade: bool = False,
    say: Callable[[str], None] = logger.info,
    engine: RolloutEngine | None = None,
) -> dict[str, Any]:
    """Evaluate and write everything to `output`; called again after a kill it goes on where it was.

    A benchmark's folder holds responses.jsonl (token ids, as they arrived), records.jsonl (with text, grade and
    score), problems.jsonl and settings.json. Where all responses are there already, no engine is opened.

    Args:
        deadline: seconds for one benchmark.
        workers, grading_deadline: grading processes, and seconds for one answer.
        regrade: judge the saved responses again.
        say: told what happens, a line each.
        engine: to use in place of one made of `choice`; it stays open.

    Returns:
        What results.json holds; the same, byte for byte, from the same responses.

    Raises:
        TestTimeError: the folder is in use, or holds responses of other settings; the prompts do not fit the model.
        DataError, RewardSpecError: a benchmark's file or verifier does not fit.
        TimeoutError: the deadline passed, or a server did not answer; what arrived is kept.
    """
    for benchmark in benchmarks:
        try_reward(benchmark.reward, deadline=grading_deadline)
    prompts = {benchmark.name: _prompts(model, benchmark) for benchmark in benchmarks}
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        for benchmark in benchmarks:
            _claim(output / benchmark.name, _settings(model, benchmark, choice), regrade=regrade)
        open_ones = [b for b in benchmarks if not _finished(output / b.name, b, len(prompts[b.name]))]
        if open_ones:
            with _engine(choice, model, engine, deadline) as running:
                if not takes_seeds(running):
                    say(
                        "the servers ignore seeds: another evaluation of the same weights samples other responses"
                    )
                for benchmark in open_ones:
                    _run(
                        running,
                        model,
                        benchmark,
                        prompts[benchmark.name],
                        choice,
                        output / benchmark.name,
                        deadline=deadline,
                        pool=(workers, grading_deadline),
                    )
        details: dict[str, dict[str, Any]] = {}
        scores: dict[str, list[tuple[float, bool]]] = {}
        for benchmark in benchmarks:
            file = output / benchmark.name / _RECORDS
            say(
                f"{benchmark.name}: {'evaluated' if benchmark in open_ones else 'all responses were there'}, {file}"
            )
            records = read_records(file)
            details[benchmark.name] = {
                "settings": _public(benchmark),
                **evaluation_detail(records, seed=benchmark.seed),
            }
            scores[benchmark.name] = [(r.score, r.right) for r in records if r.score is not None]
        results = {
            "model": str(model.path),
            "engine": choice.name,
            "score_token_id": model.score_token_id,
            "ref_logprob": model.ref_logprob,
            "beta": model.beta,
            "targets": list(model.targets),
            "benchmarks": details,
            "average": _average(details),
        }
        write_atomically(output / "results.json", json.dumps(_json(results), indent=1) + "\n")
        report = write_benchmark_report(_json(results), scores, output)
        say(f"wrote {report}")
        return results


def _run(
    engine: RolloutEngine,
    model: ModelFolder,
    benchmark: Benchmark,
    prompts: list[Prompt],
    choice: EngineChoice,
    folder: Path,
    *,
    deadline: float,
    pool: tuple[int, float],
) -> None:
    progress = Progress(benchmark.name, len(prompts) * benchmark.samples)
    with GradingPool(workers=pool[0], deadline=pool[1], function=benchmark.reward) as grading:
        evaluate(
            engine,
            prompts,
            sampling=SamplingParams(
                samples_per_prompt=benchmark.samples,
                max_new_tokens=benchmark.max_new_tokens,
                stop_token_ids=model.stop_token_ids,
                temperature=benchmark.temperature,
                top_p=benchmark.top_p,
                seed=benchmark.seed,
            ),
            decode=model.decode,
            grading=grading,
            score_token_id=model.score_token_id,
            ref_logprob=model.ref_logprob,
            beta=model.beta,
            targets=model.targets,
            records_path=folder / _RECORDS,
            deadline=deadline,
            generation_batch=choice.generation_batch,
            responses_path=folder / _RESPONSES,
            repeatable=choice.repeatable,
            on_response=progress.response,
        )
    progress.finish()


def _prompts(model: ModelFolder, benchmark: Benchmark) -> list[Prompt]:
    rows = benchmark_rows(benchmark, look=True)
    prompts, dropped = build_prompts(
        rows,
        model.tokenizer,
        prompt_suffix=benchmark.prompt_suffix,
        apply_chat_template=benchmark.apply_chat_template,
        max_prompt_tokens=benchmark.max_prompt_tokens,
        vocab_size=model.vocab_size,
        section=benchmark.name,
    )
    if dropped.rows:
        logger.warning("%s: left out of every number: %s", benchmark.name, dropped)
    if model.score_token_id is not None:
        refuse_score_token(rows, prompts, model.tokenizer, model.score_token_id)
    prompts = prompts[: benchmark.max_problems]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    # one position more: the score token's
    room = model.max_positions - longest - 1
    if room < 1:
        raise TestTimeError(
            f"{benchmark.name}: the longest prompt has {longest} tokens, but the model reads {model.max_positions}; "
            f"set {benchmark.name}.max_prompt_tokens to leave such problems out, or evaluate a model that can read them"
        )
    if longest + benchmark.max_new_tokens + 1 > model.max_positions:
        raise TestTimeError(
            f"{benchmark.name}: the longest prompt {longest} + max_new_tokens {benchmark.max_new_tokens} + 1 is more "
            f"than the model's max_position_embeddings {model.max_positions}; set {benchmark.name}.max_new_tokens="
            f"{room} or less"
        )
    return prompts


def _settings(model: ModelFolder, benchmark: Benchmark, choice: EngineChoice) -> dict[str, Any]:
    """What responses and records depend on."""
    weights = sorted((file.name, file.stat().st_size) for file in model.path.glob("*.safetensors"))
    return _json(
        {
            "model": str(model.path),
            "weights": [list(entry) for entry in weights],
            "data": fingerprint(benchmark.path, [benchmark.prompt_key, benchmark.answer_key]),
            "engine": choice.name,
            "generation_batch": choice.generation_batch if choice.repeatable else None,
            "stop_token_ids": list(model.stop_token_ids),
            "score_token_id": model.score_token_id,
            "ref_logprob": model.ref_logprob,
            "beta": model.beta,
            "targets": list(model.targets),
            **{name: value for name, value in _public(benchmark).items() if name not in ("path", "id_key")},
        }
    )


def _claim(folder: Path, settings: dict[str, Any], *, regrade: bool) -> None:
    """Make the folder this evaluation's, or refuse it; drops records that are to be made anew."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _SETTINGS
    if file.is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in settings if saved.get(name) != settings[name]]
        sampled = [name for name in differing if name not in _JUDGING]
        if sampled:
            told = "; ".join(f"{name}: saved {saved.get(name)!r}, now {settings[name]!r}" for name in sampled)
            raise TestTimeError(
                f"{folder} holds responses of another evaluation ({told}); give another --output, or the same settings"
            )
        regrade = regrade or bool(differing)
    if regrade:
        (folder / _RECORDS).unlink(missing_ok=True)
    write_atomically(file, json.dumps(settings, indent=1) + "\n")


def _finished(folder: Path, benchmark: Benchmark, problems: int) -> bool:
    """Whether all records are there; writes problems.jsonl beside them."""
    rows = benchmark_rows(benchmark)
    names = read_ids(benchmark.path, benchmark.id_key)
    lines = (
        json.dumps(
            {"row": row.row, "id": name, "problem": row.problem, "answer": row.answer}, ensure_ascii=False
        )
        for row, name in zip(rows, names, strict=True)
    )
    write_atomically(folder / "problems.jsonl", "\n".join(lines) + "\n")
    records, summary = folder / _RECORDS, (folder / _RECORDS).with_suffix(".json")
    if not (records.is_file() and summary.is_file()):
        return False
    return len(read_records(records)) == problems * benchmark.samples


def _public(benchmark: Benchmark) -> dict[str, Any]:
    return asdict(benchmark) | {"path": str(benchmark.path)}


def _average(details: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Means over the benchmarks, as the paper's table has them: each benchmark counts once."""
    names = ("accuracy", "self_reward_f1", "boxed_self_reward_f1", "self_reward_auroc", "self_reward_ece")
    summaries = [detail["summary"] for detail in details.values()]
    return {
        name: sum(summary[name] for summary in summaries) / len(summaries)
        for name in names
        if all(name in summary for summary in summaries)
    }


def _json(value: Any) -> Any:
    """Nested dictionaries as JSON can hold them."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    return plain(value)


@contextmanager
def _engine(
    choice: EngineChoice, model: ModelFolder, given: RolloutEngine | None, deadline: float
) -> Iterator[RolloutEngine]:
    if given is not None:
        yield given
        return
    started = time.monotonic()
    with open_engine(choice, model, deadline=deadline) as engine:
        logger.info("the engine (%s) was ready after %.1f s", choice.name, time.monotonic() - started)
        yield engine


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    with (output / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TestTimeError(
                f"{output} is in use by another evaluation; wait, or give another --output"
            ) from None
        yield

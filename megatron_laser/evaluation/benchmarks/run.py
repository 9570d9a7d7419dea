"""`megatron-laser eval`: benchmarks on any engine, resumable, to results.json, report.md and plots."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.data import ChatOptions, build_prompts, read_ids, refuse_score_tokens
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.benchmarks.folder import (
    RECORDS,
    RESPONSES,
    as_json,
    benchmark_settings,
    claim_benchmark_folder,
    locked_output,
    response_settings,
    set_aside,
)
from megatron_laser.evaluation.benchmarks.settings import Benchmark, benchmark_rows, benchmark_rule
from megatron_laser.evaluation.early_ending import EndingEngine
from megatron_laser.evaluation.engine_choice import EngineChoice
from megatron_laser.evaluation.evaluator import evaluate
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.pinned_weights import PinnedWeights
from megatron_laser.evaluation.prefix_summary import StopBelow, prefix_detail
from megatron_laser.evaluation.progress import Progress
from megatron_laser.evaluation.records import read_records
from megatron_laser.evaluation.responses import EvaluationEngine
from megatron_laser.evaluation.summary import evaluation_detail
from megatron_laser.evaluation.weight_identity import WeightsChanged
from megatron_laser.files import write_atomically
from megatron_laser.report.benchmark_report import write_benchmark_report
from megatron_laser.rewards import GradingPool, try_reward
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.engine import RolloutEngine, StopEarly, StoppedEarly, takes_seeds
from megatron_laser.types import Prompt, SamplingParams

logger = logging.getLogger(__name__)

_LOOK_EVERY = 10.0  # seconds between two looks at whether the weights are still the same
_FINGERPRINTS = ".fingerprints.json"


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
    stop: StopBelow | None = None,
) -> dict[str, Any]:
    """Evaluate and write everything to `output`; called again after a kill it goes on where it was.

    A benchmark's folder holds responses.jsonl (token ids, as they arrived), records.jsonl (with text, grade and
    score), problems.jsonl and settings.json. Responses are reused only if the weights are the same by content; else
    the folder is set aside. Where all are there already, the model is not loaded.

    Args:
        deadline: seconds for one benchmark.
        workers, grading_deadline: grading processes, and seconds for one answer.
        regrade: judge the saved responses again.
        say: told what happens, a line each.
        engine: to use in place of one made of `choice`; it stays open.
        stop: which scores of prefixes end responses, of models whose prefixes are scored (`ModelFolder.prefix`).

    Returns:
        What results.json holds; the same, byte for byte, from the same responses.

    Raises:
        TestTimeError: the folder is in use, or holds responses of other settings; the prompts do not fit the model.
        WeightsChanged: the weights were changed meanwhile.
        DataError, RewardSpecError: a benchmark's file or verifier does not fit.
        TimeoutError: the deadline passed, or a server did not answer; what arrived is kept.
    """
    stop = stop or StopBelow()
    if stop.end_early and model.prefix is None:
        raise TestTimeError("responses end by scores of prefixes, and none are scored; give --prefix-every")
    ended_below = stop.thresholds[0] if stop.end_early else None
    for benchmark in benchmarks:
        row = benchmark_rows(benchmark)[0] if ":" in benchmark.reward or benchmark.reward_rule else None
        try_reward(benchmark.reward, row, deadline=grading_deadline, rule=benchmark_rule(benchmark))
    prompts = {benchmark.name: _prompts(model, benchmark) for benchmark in benchmarks}
    output.mkdir(parents=True, exist_ok=True)
    with locked_output(output):
        with PinnedWeights(
            choice, model, deadline=deadline, engine=engine, cache=output / _FINGERPRINTS
        ) as weights:
            for benchmark in benchmarks:
                settings = response_settings(
                    model, benchmark, choice, prompts[benchmark.name], weights.identity, ended_below
                )
                told = claim_benchmark_folder(output / benchmark.name, settings, regrade=regrade)
                if told:
                    say(f"{benchmark.name}: {told}")
            open_ones = [b for b in benchmarks if not _finished(output / b.name, b, len(prompts[b.name]))]
            if open_ones and not takes_seeds(weights.engine()):
                say(
                    "the servers ignore seeds: another evaluation of the same weights samples other responses"
                )
            for benchmark in open_ones:
                _run(
                    weights,
                    model,
                    benchmark,
                    prompts[benchmark.name],
                    choice,
                    output / benchmark.name,
                    deadline=deadline,
                    pool=(workers, grading_deadline),
                    ended_below=ended_below,
                )
        for benchmark in benchmarks:
            done = "evaluated" if benchmark in open_ones else "all responses were there"
            say(f"{benchmark.name}: {done}, {output / benchmark.name / RECORDS}")
        return _write_results(model, benchmarks, choice, output, weights.identity, say, stop)


def _run(
    weights: PinnedWeights,
    model: ModelFolder,
    benchmark: Benchmark,
    prompts: list[Prompt],
    choice: EngineChoice,
    folder: Path,
    *,
    deadline: float,
    pool: tuple[int, float],
    ended_below: float | None,
) -> None:
    """Answer and judge what is missing; sets the folder aside when the weights were not the same all the time."""
    engine: EvaluationEngine = weights.engine()
    readable = _longest_sequence(engine, model)
    if ended_below is not None and model.prefix is not None:
        longest = max(len(prompt.token_ids) for prompt in prompts) + benchmark.max_new_tokens
        if longest >= readable:  # stretches are short, and would be refused only once a response has grown
            raise TestTimeError(
                f"{benchmark.name}: the longest prompt + max_new_tokens + 1 = {longest + 1} is more than the "
                f"{readable} tokens that a server reads; lower {benchmark.name}.max_new_tokens, or start it with a "
                "longer context"
            )
        engine = EndingEngine(
            weights.engine(), model.prefix, threshold=ended_below, max_positions=model.max_positions
        )
    ends = time.monotonic() + deadline
    with GradingPool(
        workers=pool[0], deadline=pool[1], function=benchmark.reward, rule=benchmark_rule(benchmark)
    ) as grading:
        while True:
            progress = Progress(benchmark.name, len(prompts) * benchmark.samples)
            watch = _Watch(weights, progress)
            try:
                with progress:
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
                        rule=model.rule,
                        records_path=folder / RECORDS,
                        deadline=max(ends - time.monotonic(), 1e-9),
                        generation_batch=choice.generation_batch,
                        responses_path=folder / RESPONSES,
                        repeatable=choice.repeatable,
                        on_response=watch.response,
                        stop=watch.stop,
                        force_end_below=readable,
                        prefixes=model.prefix,
                    )
            except StoppedEarly:
                _check(weights, folder)  # nothing had changed but a time: go on
                continue
            except Exception:
                with contextlib.suppress(ServerError):  # one that is gone; the next attempt asks again
                    _check(weights, folder)  # what is kept for that attempt must be of one model
                raise
            _check(weights, folder)
            return


def _longest_sequence(engine: EvaluationEngine, model: ModelFolder) -> int:
    """Tokens that model and servers can read."""
    if not isinstance(engine, SglangEngine):
        return model.max_positions
    limits = [facts.longest_input for facts in engine.identify_all().values()]
    return min([model.max_positions, *(limit for limit in limits if limit is not None)])


class _Watch:
    """Hears of every response, and stops the evaluation soon after the weights seem to have changed."""

    def __init__(self, weights: PinnedWeights, progress: Progress) -> None:
        self.stop = StopEarly()
        self._weights = weights
        self._progress = progress
        self._next = time.monotonic() + _LOOK_EVERY

    def response(self, tokens: int, new: bool) -> None:
        """See `evaluate`'s `on_response`."""
        self._progress.response(tokens, new)
        if new and time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOOK_EVERY
            if self._weights.seem_changed():
                self.stop.set()


def _check(weights: PinnedWeights, folder: Path) -> None:
    try:
        weights.check()
    except WeightsChanged as error:
        raise WeightsChanged(
            f"{error}. Responses of two models may be mixed in {set_aside(folder)}, which counts for nothing; the "
            "same command starts anew"
        ) from None


def _prompts(model: ModelFolder, benchmark: Benchmark) -> list[Prompt]:
    rows = benchmark_rows(benchmark, look=True)
    prompts, dropped = build_prompts(
        rows,
        model.tokenizer,
        prompt_suffix=benchmark.prompt_suffix,
        apply_chat_template=benchmark.apply_chat_template,
        options=ChatOptions(benchmark.chat_template_arguments, benchmark.system_prompt),
        max_prompt_tokens=benchmark.max_prompt_tokens,
        vocab_size=model.vocab_size,
        section=benchmark.name,
    )
    if dropped.rows:
        logger.warning("%s: left out of every number: %s", benchmark.name, dropped)
    refuse_score_tokens(rows, prompts, model.tokenizer, model.readout_tokens)
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
    records, summary = folder / RECORDS, (folder / RECORDS).with_suffix(".json")
    if not (records.is_file() and summary.is_file()):
        return False
    return len(read_records(records)) == problems * benchmark.samples


def _write_results(
    model: ModelFolder,
    benchmarks: Sequence[Benchmark],
    choice: EngineChoice,
    output: Path,
    weights: str | None,
    say: Callable[[str], None],
    stop: StopBelow,
) -> dict[str, Any]:
    """results.json, report.md and plots, from the records of every benchmark."""
    details: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[tuple[float, bool]]] = {}
    for benchmark in benchmarks:
        records = read_records(output / benchmark.name / RECORDS)
        details[benchmark.name] = {
            "settings": benchmark_settings(benchmark),
            **evaluation_detail(records, seed=benchmark.seed),
        }
        if model.prefix is not None:
            prefix = prefix_detail(records, model.prefix, stop, seed=benchmark.seed)
            details[benchmark.name]["prefix"] = prefix
        scores[benchmark.name] = [(r.score, r.right) for r in records if r.score is not None and r.graded]
    results = {
        "model": str(model.path),
        "weights": weights,
        "engine": choice.name,
        "score_token_id": model.score_token_id,
        "ref_logprob": model.ref_logprob,
        "beta": model.beta,
        "targets": list(model.targets),
        "benchmarks": details,
        "average": averages(details),
    }
    write_atomically(output / "results.json", json.dumps(as_json(results), indent=1) + "\n")
    report = write_benchmark_report(as_json(results), scores, output)
    say(f"wrote {report}")
    return results


def averages(details: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Means over the benchmarks, as the paper's table has them: each benchmark counts once."""
    names = (
        *("accuracy", "self_reward_f1", "boxed_self_reward_f1", "released_self_reward_f1"),
        *("self_reward_auroc", "self_reward_ece"),
    )
    summaries = [detail["summary"] for detail in details.values()]
    return {
        name: sum(summary[name] for summary in summaries) / len(summaries)
        for name in names
        if all(name in summary for summary in summaries)
    }

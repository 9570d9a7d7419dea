"""Evaluation on an engine whose responses and probabilities are known."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.evaluation import (
    EvaluationSummary,
    evaluate,
    generation_batch,
    progress,
    read_records,
    summarize,
)
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.evaluation.validation import RunEvaluation
from megatron_laser.observability.timers import Timers
from megatron_laser.rewards import GradingPool
from megatron_laser.types import Generation, Prompt, SamplingParams

EOS, NEWLINE, SCORE_TOKEN = 0, 1, 2
REF_LOGPROB, BETA = -20.0, 0.1
TEXTS = {
    10: "\\boxed{1}",
    11: "\\boxed{2}",
    12: "\\boxed{3}",
    13: "no idea",
    14: "\\boxed{\\frac{2}{4}}",
    15: "\\boxed{0.5}",
}


def stopped(token: int, zc_logprob: float, logprob: float = -1.0) -> tuple[Generation, float]:
    return Generation([token, EOS], [logprob, logprob], "stop", 3), zc_logprob


def truncated(token: int) -> tuple[Generation, float]:
    return Generation([token, token, token], [-1.0] * 3, "length", 3), math.nan


def stopped_by_a_string(token: int) -> tuple[Generation, float]:
    return Generation([token, NEWLINE], [-1.0, -1.0], "stop", 3), math.nan


class FakeEngine:
    """Answers prompt [row + 100] with the row's script, and knows log pi(score token) of each response."""

    def __init__(self, script: list[list[tuple[Generation, float]]], *, scores_at_once: bool = False) -> None:
        self.script = script
        self.scores_at_once = scores_at_once
        self.generate_calls: list[tuple[list[int], SamplingParams]] = []
        self.scored: list[list[int]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Any = None,
        stop: Any = None,
    ) -> list[list[Generation]]:
        assert deadline > 0 and on_finished is not None
        rows = [prompt[0] - 100 for prompt in prompts]
        self.generate_calls.append((rows, sampling))
        results = [[generation for generation, _ in self.script[row]] for row in rows]
        if self.scores_at_once:
            for row, generations in zip(rows, results):
                for generation, (_, zc_logprob) in zip(generations, self.script[row]):
                    generation.zc_logprob = None if math.isnan(zc_logprob) else zc_logprob
        return results

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        assert token_id == SCORE_TOKEN and deadline > 0
        self.scored += [list(sequence) for sequence in sequences]
        values: list[float] = []
        for prompt, *response in sequences:
            values.append(
                next(z for g, z in self.script[prompt - 100] if g.response_ids.tolist() == response)
            )
        return values


@pytest.fixture(scope="module")
def grading() -> Iterator[GradingPool]:
    with GradingPool(workers=1) as pool:
        yield pool


def run(engine: FakeEngine, grading: GradingPool, folder: Path, **changes: Any) -> EvaluationSummary:
    prompts = [Prompt(row, f"problem {row}", "1", [row + 100]) for row in range(len(engine.script))]
    sampling = SamplingParams(len(engine.script[0]) if engine.script else 1, 8, (EOS,), seed=5)
    settings: dict[str, Any] = {
        "sampling": sampling,
        "decode": lambda ids: TEXTS[ids[0]],
        "grading": grading,
        "records_path": folder / "evaluation" / "test_step_4.jsonl",
        "deadline": 60.0,
        "generation_batch": 1000,
    }
    token, reference = changes.pop("score_token_id", SCORE_TOKEN), changes.pop("ref_logprob", REF_LOGPROB)
    rule = ScoreRule(() if token is None else (token,), reference, BETA, changes.pop("targets", (1.0, 0.0)))
    return evaluate(engine, prompts, rule=rule, **(settings | changes))


# Right answer: 1, token 10. Row 0: two unscored wrong ones outvote a right one, whose score is 0.6.
# Row 1: a wrong one with score 0.9, two right ones with 0.2 and 0.1.
SCRIPT = [
    [truncated(11), stopped_by_a_string(11), stopped(10, -14.0, logprob=-0.2)],
    [stopped(12, -11.0, logprob=-0.3), stopped(10, -18.0, logprob=-0.1), truncated(10)],
    [stopped(13, -30.0, logprob=-2.0), stopped(10, -12.0, logprob=-0.1), stopped(11, -19.0, logprob=-0.5)],
]


def test_records_hold_what_was_sampled_graded_and_scored(grading: GradingPool, tmp_path: Path) -> None:
    summary = run(FakeEngine(SCRIPT), grading, tmp_path)
    records = read_records(summary.records_path)
    assert [(record.row, record.sample) for record in records] == [(r, s) for r in range(3) for s in range(3)]
    right = records[2]
    assert (right.outcome, right.reward, right.extracted, right.right) == ("correct", 1.0, "1", True)
    assert (right.response, right.response_ids_length, right.finish_reason) == ("\\boxed{1}", 2, "stop")
    assert right.zc_logprob == -14.0
    assert right.score == pytest.approx(BETA * (-14.0 - REF_LOGPROB))
    assert right.mean_logprob == pytest.approx(-0.2)
    assert [record.outcome for record in records[6:]] == ["no_answer", "correct", "wrong"]
    assert [record.answer_class for record in records] == [0, 0, 1, 0, 1, 1, None, 0, 1]


def test_only_responses_that_ended_in_a_stop_token_are_scored(grading: GradingPool, tmp_path: Path) -> None:
    engine = FakeEngine(SCRIPT)
    records = read_records(run(engine, grading, tmp_path).records_path)
    assert engine.scored == [
        [100, 10, EOS],
        [101, 12, EOS],
        [101, 10, EOS],
        [102, 13, EOS],
        [102, 10, EOS],
        [102, 11, EOS],
    ]
    assert [record.scored for record in records[:3]] == [False, False, True]
    assert [record.score for record in records[:2]] == [None, None]


def test_scores_returned_with_the_responses_are_used_instead_of_a_second_call(
    grading: GradingPool, tmp_path: Path
) -> None:
    asked = run(FakeEngine(SCRIPT), grading, tmp_path / "asked")
    engine = FakeEngine(SCRIPT, scores_at_once=True)
    at_once = run(engine, grading, tmp_path / "at_once")
    for generation, _ in (entry for row in SCRIPT for entry in row):
        generation.zc_logprob = None
    assert engine.scored == []
    assert engine.generate_calls[0][1].score_token_id == SCORE_TOKEN
    assert at_once.records_path.read_text() == asked.records_path.read_text()


def test_other_targets_move_the_scale_of_everything_that_reads_a_score(
    grading: GradingPool, tmp_path: Path
) -> None:
    """A run that trains (1, 0) and one that trains (0, -1) and reached its targets as well have the same numbers."""
    plain = run(FakeEngine(SCRIPT), grading, tmp_path / "plain").metrics
    moved = [[(generation, zc_logprob - 1.0 / BETA) for generation, zc_logprob in row] for row in SCRIPT]
    metrics = run(FakeEngine(moved), grading, tmp_path / "moved", targets=(0.0, -1.0)).metrics
    names = {name for name in plain if not name.startswith("zc_logprob")}
    assert {"self_reward_ece", "self_reward_f1", "weighted_majority", "score_right_mean"} <= names
    assert {name: metrics[name] for name in names} == pytest.approx(
        {name: plain[name] for name in names}, nan_ok=True
    )


def test_summary_has_the_numbers_worked_out_by_hand(grading: GradingPool, tmp_path: Path) -> None:
    metrics = run(FakeEngine(SCRIPT), grading, tmp_path).metrics
    assert metrics["accuracy"] == pytest.approx(4 / 9)
    assert metrics["pass_at_3"] == 1.0
    assert metrics["pass_at_1"] == pytest.approx(4 / 9)
    assert metrics["average_at_3"] == pytest.approx(4 / 9)
    # Row 0: only the right response has a weight. Row 1: 0.9 against 0.2 + 0. Row 2: 0.8 against 0.1.
    assert metrics["weighted_majority"] == metrics["weighted_majority_at_3"] == pytest.approx(2 / 3)
    assert metrics["best_of"] == pytest.approx(2 / 3)
    assert metrics["outcome/correct"] == 4
    assert metrics["outcome/wrong"] == 4
    assert metrics["outcome/no_answer"] == 1
    assert metrics["truncated_fraction"] == pytest.approx(2 / 9)
    assert metrics["response_length_mean"] == pytest.approx((7 * 2 + 2 * 3) / 9)
    assert metrics["samples_per_prompt"] == 3


def test_responses_without_a_score_are_outside_verification_and_both_counts_are_stated(
    grading: GradingPool, tmp_path: Path
) -> None:
    metrics = run(FakeEngine(SCRIPT), grading, tmp_path).metrics
    assert (metrics["num_responses"], metrics["num_scored"], metrics["num_scored_boxed"]) == (9, 6, 5)
    # Scored right ones: 0.6, 0.2, 0.8; wrong ones: 0.9, -1.0 (no box), 0.1.
    assert metrics["self_reward_accuracy_correct"] == pytest.approx(2 / 3)
    assert metrics["self_reward_accuracy_incorrect"] == pytest.approx(2 / 3)
    assert metrics["self_reward_f1"] == pytest.approx(2 / 3)
    assert metrics["self_reward_auroc"] == pytest.approx(6 / 9)
    assert metrics["boxed_self_reward_auroc"] == pytest.approx(3 / 6)
    brier = (0.4**2 + 0.8**2 + 0.2**2 + 0.9**2 + 0.0 + 0.1**2) / 6
    assert metrics["self_reward_brier"] == pytest.approx(brier)
    # Mean log-probs: right -0.2, -0.1, -0.1; wrong -0.3, -2.0, -0.5. All lengths are equal.
    assert metrics["mean_logprob_auroc"] == 1.0
    assert metrics["length_auroc"] == 0.5


def test_the_gain_of_the_weighted_vote_has_a_seeded_interval(grading: GradingPool, tmp_path: Path) -> None:
    summary = run(FakeEngine(SCRIPT), grading, tmp_path)
    metrics = summary.metrics
    assert metrics["weighted_minus_majority"] == pytest.approx(
        metrics["weighted_majority"] - metrics["majority"]
    )
    assert metrics["weighted_minus_majority_low"] <= metrics["weighted_minus_majority"]
    assert metrics["weighted_minus_majority"] <= metrics["weighted_minus_majority_high"]
    again = summarize(read_records(summary.records_path), seed=5)
    assert again == pytest.approx(metrics, nan_ok=True)


def test_the_summary_file_holds_the_metrics(grading: GradingPool, tmp_path: Path) -> None:
    summary = run(FakeEngine(SCRIPT), grading, tmp_path)
    assert summary.summary_path == tmp_path / "evaluation" / "test_step_4.json"
    written = json.loads(summary.summary_path.read_text())
    assert written["accuracy"] == summary.metrics["accuracy"]
    assert written.keys() == summary.metrics.keys()
    assert summary.prefixed()["eval/accuracy"] == summary.metrics["accuracy"]


def test_servers_are_asked_for_more_than_they_answer_at_once() -> None:
    assert generation_batch(in_process=True, max_batch_size=256, max_concurrency=1024) == 256
    assert generation_batch(in_process=False, max_batch_size=256, max_concurrency=1024) == 8192
    assert generation_batch(in_process=False, max_batch_size=256, max_concurrency=4) == 2048


def test_numbers_do_not_depend_on_the_generation_batch(grading: GradingPool, tmp_path: Path) -> None:
    whole, parts = FakeEngine(SCRIPT), FakeEngine(SCRIPT)
    one = run(whole, grading, tmp_path / "one")
    three = run(parts, grading, tmp_path / "three", generation_batch=2)
    assert [rows for rows, _ in whole.generate_calls] == [[0, 1, 2]]
    assert [rows for rows, _ in parts.generate_calls] == [[0], [1], [2]]
    assert len({sampling.seed for _, sampling in parts.generate_calls}) == 3
    assert one.metrics == pytest.approx(three.metrics, nan_ok=True)


def test_answers_are_compared_as_mathematics(grading: GradingPool, tmp_path: Path) -> None:
    script = [[stopped(14, -20.0), stopped(15, -20.0), stopped(11, -20.0)]]
    records = read_records(run(FakeEngine(script), grading, tmp_path).records_path)
    assert [record.answer_class for record in records] == [0, 0, 1]


def test_finished_batches_are_kept_when_a_later_one_fails(grading: GradingPool, tmp_path: Path) -> None:
    run(FakeEngine(SCRIPT), grading, tmp_path)  # an older, complete evaluation of the same name

    class Breaks(FakeEngine):
        def generate(self, prompts: Any, sampling: Any, **options: Any) -> list[list[Generation]]:
            if self.generate_calls:
                raise TimeoutError("the server did not answer")
            return super().generate(prompts, sampling, **options)

    with pytest.raises(TimeoutError, match=r"1 of 3 prompts were done.*the server did not answer"):
        run(Breaks(SCRIPT), grading, tmp_path, generation_batch=3)
    path = tmp_path / "evaluation" / "test_step_4.jsonl"
    assert [record.row for record in read_records(path)] == [0, 0, 0]
    assert not path.with_suffix(".json").exists()


def test_a_deadline_that_has_passed_says_how_far_it_came(grading: GradingPool, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"0 of 3 prompts were done when its 1e-09 s ended"):
        run(FakeEngine(SCRIPT), grading, tmp_path, deadline=1e-9)


def test_without_a_score_token_there_are_no_scores_and_no_weighted_votes(
    grading: GradingPool, tmp_path: Path
) -> None:
    engine = FakeEngine(SCRIPT)
    summary = run(engine, grading, tmp_path, score_token_id=None)
    assert engine.scored == []
    assert summary.metrics["num_scored"] == 0
    assert math.isnan(summary.metrics["self_reward_f1"])
    assert not [name for name in summary.metrics if name.startswith(("weighted", "best_of", "zc_"))]
    assert summary.metrics["majority"] >= 0


def test_without_a_reference_the_score_tokens_logprob_is_recorded_but_gives_no_score(
    grading: GradingPool, tmp_path: Path
) -> None:
    summary = run(FakeEngine(SCRIPT), grading, tmp_path, ref_logprob=None)
    assert summary.metrics["zc_logprob_mean"] == pytest.approx((-14 - 11 - 18 - 30 - 12 - 19) / 6)
    assert summary.metrics["zc_logprob_max"] == -11
    assert all(record.score is None for record in read_records(summary.records_path))


def test_a_logprob_that_is_not_finite_is_refused(grading: GradingPool, tmp_path: Path) -> None:
    script = [[stopped(10, -math.inf)]]
    with pytest.raises(RuntimeError, match="log-prob -inf of score token 2 for a response to row 0"):
        run(FakeEngine(script), grading, tmp_path)


def test_an_engine_that_returns_too_few_responses_is_refused(grading: GradingPool, tmp_path: Path) -> None:
    script = [*SCRIPT, SCRIPT[0][:1]]
    with pytest.raises(RuntimeError, match=r"returned \[3, 3, 3, 1\] responses for 4 prompts; expected 3"):
        run(FakeEngine(script), grading, tmp_path)


def test_nothing_to_evaluate_is_refused(grading: GradingPool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.max_prompts"):
        run(FakeEngine([]), grading, tmp_path)
    with pytest.raises(ValueError, match="generation_batch is 0"):
        run(FakeEngine(SCRIPT), grading, tmp_path, generation_batch=0)
    with pytest.raises(ValueError, match="no evaluation records"):
        summarize([])


def test_a_broken_record_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not an evaluation record"):
        read_records(path)


class _SlowEngine(FakeEngine):
    """Answers when `gate` is open; tells of each response as a real engine does."""

    def __init__(self, script: list[list[tuple[Generation, float]]], gate: threading.Event) -> None:
        super().__init__(script)
        self.gate = gate

    def generate(self, prompts: Any, sampling: SamplingParams, **others: Any) -> list[list[Generation]]:
        groups = super().generate(prompts, sampling, **others)
        assert self.gate.wait(20)
        for row, group in enumerate(groups):
            for number, generation in enumerate(group):
                others["on_finished"](row, number, generation)
        self.gate.clear()
        assert self.gate.wait(20)
        return groups


def test_an_evaluation_within_a_run_says_how_far_it_is(
    grading: GradingPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first response, too: minutes without a line look like a run that hangs."""
    monkeypatch.setattr(progress, "_EVERY_IN_LOG", 0.01)
    save_tiny_model(tmp_path / "model", "qwen2")
    config = run_config(tmp_path, tmp_path / "model", evaluation={"samples_per_prompt": 3})
    prompts = [Prompt(row, f"problem {row}", "1", [row + 100]) for row in range(len(SCRIPT))]
    gate = threading.Event()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if any(f": {count}/9 responses" in line for count in (0, 9)):
            gate.set()

    evaluation = RunEvaluation(
        config,
        {"validation": prompts},
        _SlowEngine(SCRIPT, gate),  # type: ignore[arg-type]
        grading,
        Timers(),
        tokenizer=SimpleNamespace(decode=lambda ids, **_: TEXTS[ids[0]]),
        stop_token_ids=(EOS,),
        score_token_id=SCORE_TOKEN,
        last_step=0,
        say=say,
    )
    assert evaluation.run("validation", 7)["eval/num_responses"] == 9
    assert lines[0] == "validation split after step 7: 0/9 responses (0%)"
    assert lines[-1].startswith("validation split after step 7: 9/9 responses (100%), ")


def test_a_source_may_have_its_own_number_of_responses_and_temperature(
    grading: GradingPool, tmp_path: Path
) -> None:
    class Repeats(FakeEngine):
        def generate(self, prompts: Any, sampling: SamplingParams, **settings: Any) -> list[list[Generation]]:
            self.generate_calls.append(([prompt[0] - 100 for prompt in prompts], sampling))
            return [[stopped(10, -14.0)[0]] * sampling.samples_per_prompt for _ in prompts]

    engine = Repeats([])
    prompts = [Prompt(row, "", "1", [row + 100], source=source) for row, source in enumerate("aabba")]
    plain = SamplingParams(1, 8, (EOS,), seed=5)
    often = SamplingParams(4, 8, (EOS,), temperature=0.5, seed=5)
    summary = evaluate(
        engine,
        prompts,
        sampling=plain,
        own_sampling={"b": often},
        decode=lambda ids: TEXTS[ids[0]],
        grading=grading,
        rule=ScoreRule((), None, BETA),
        records_path=tmp_path / "validation_step_1.jsonl",
        deadline=60.0,
        generation_batch=7,
        responses_path=tmp_path / "partial",
    )
    calls = [(rows, own.samples_per_prompt, own.temperature) for rows, own in engine.generate_calls]
    # at most seven responses in a call, or one prompt's
    assert calls == [([0, 1], 1, 1.0), ([2], 4, 0.5), ([3], 4, 0.5), ([4], 1, 1.0)]
    records = read_records(summary.records_path)
    assert [(record.row, record.sample) for record in records] == [
        *((0, 0), (1, 0)),
        *((row, sample) for row in (2, 3) for sample in range(4)),
        (4, 0),
    ]
    metrics = summary.metrics
    assert metrics["samples_per_prompt"] == 1 and metrics["source/b/samples_per_prompt"] == 4
    assert metrics["source/b/pass_at_4"] == 1.0 and "source/a/pass_at_2" not in metrics

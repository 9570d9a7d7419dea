"""An evaluation goes on where it was, with the numbers of an undisturbed one."""

import json
from dataclasses import replace

import pytest

from megatron_laser.evaluation import evaluate, read_records
from megatron_laser.evaluation.responses import ResponseFile, SavedResponse, stream_seed
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.rewards import GradingPool
from megatron_laser.types import Generation, Prompt, SamplingParams

EOS, SCORE = 0, 2
PROMPTS = [Prompt(row, f"problem {row}", str(row % 3), [row + 100]) for row in range(6)]
SAMPLES = 4


class SeededEngine:
    """Responses depend on seed, prompt and sample alone; stops the evaluation after some calls or responses."""

    def __init__(self, *, dies_after=None):
        self.calls = []
        self.responses = 0
        self.dies_after = dies_after

    def generate(self, prompts, sampling, *, deadline, on_finished=None, stop=None):
        self.calls.append(([prompt[0] for prompt in prompts], sampling.samples_per_prompt))
        groups = []
        for index, prompt in enumerate(prompts):
            groups.append([])
            for number in range(sampling.samples_per_prompt):
                if self.responses == self.dies_after:
                    raise KeyboardInterrupt
                digit = (sampling.seed // 7 + prompt[0] * 31 + number * 17) % 3
                generation = Generation(
                    [10 + digit, EOS], [-0.1 * (digit + 1), -0.5], "stop", 0, zc_logprob=-20.0 + digit
                )
                groups[-1].append(generation)
                self.responses += 1
                if on_finished is not None:
                    on_finished(index, number, generation)
        return groups

    def score(self, sequences, token_id, *, deadline):
        raise AssertionError("the scores came with the responses")


@pytest.fixture(scope="module")
def grading():
    with GradingPool(workers=1) as pool:
        yield pool


def run(engine, grading, folder, **changes):
    settings = {
        "sampling": SamplingParams(SAMPLES, 8, (EOS,), seed=5),
        "decode": lambda ids: f"\\boxed{{{ids[0] - 10}}}",
        "grading": grading,
        "rule": ScoreRule((SCORE,), -20.0, 0.5),
        "records_path": folder / "records.jsonl",
        "responses_path": folder / "responses.jsonl",
        "deadline": 60.0,
        "generation_batch": 2 * SAMPLES,
    }
    return evaluate(engine, PROMPTS, **(settings | changes))


@pytest.mark.parametrize("dies_after", [0, 3, 8, 13, 23])
def test_interrupted_anywhere_and_started_again_it_writes_the_same_bytes(grading, tmp_path, dies_after):
    whole = run(SeededEngine(), grading, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(SeededEngine(dies_after=dies_after), grading, tmp_path / "cut")
    assert len((tmp_path / "cut" / "responses.jsonl").read_text().splitlines()) == dies_after
    again = run(SeededEngine(), grading, tmp_path / "cut")
    assert again.metrics == pytest.approx(whole.metrics, nan_ok=True)
    assert again.records_path.read_bytes() == whole.records_path.read_bytes()


def test_finished_batches_are_not_sampled_again(grading, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(SeededEngine(dies_after=11), grading, tmp_path)
    engine = SeededEngine()
    run(engine, grading, tmp_path)
    assert [prompts for prompts, _ in engine.calls] == [[102, 103], [104, 105]]
    nothing = SeededEngine()
    run(nothing, grading, tmp_path)
    assert nothing.calls == []


def test_an_engine_that_does_not_repeat_itself_is_asked_for_missing_responses_only(grading, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(SeededEngine(dies_after=11), grading, tmp_path, repeatable=False)
    before = (tmp_path / "responses.jsonl").read_text()
    engine = SeededEngine()
    run(engine, grading, tmp_path, repeatable=False)
    # of the second batch three responses to prompt 102 were there
    assert engine.calls == [([102, 103, 103, 103, 103], 1), ([104, 105], SAMPLES)]
    assert (tmp_path / "responses.jsonl").read_text().startswith(before)
    records = read_records(tmp_path / "records.jsonl")
    assert [(r.row, r.sample) for r in records] == [(row, s) for row in range(6) for s in range(SAMPLES)]


def test_the_stream_of_a_completing_call_is_not_that_of_the_first():
    seeds = {stream_seed(5, start, attempt) for start in (0, 2) for attempt in (0, 1, 3)}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_line_that_a_kill_cut_off_is_sampled_again(grading, tmp_path):
    whole = run(SeededEngine(), grading, tmp_path)
    expected = whole.records_path.read_bytes()
    for name in ("responses.jsonl", "records.jsonl"):
        file = tmp_path / name
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:13]) + lines[13][:20])
    run(SeededEngine(), grading, tmp_path)
    assert whole.records_path.read_bytes() == expected
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 6 * SAMPLES


def test_records_that_are_lost_are_judged_again_from_the_responses(grading, tmp_path):
    whole = run(SeededEngine(), grading, tmp_path)
    expected = whole.records_path.read_bytes()
    whole.records_path.unlink()
    engine = SeededEngine()
    run(engine, grading, tmp_path)
    assert engine.calls == [] and whole.records_path.read_bytes() == expected


def test_without_a_responses_file_it_starts_anew(grading, tmp_path):
    run(SeededEngine(), grading, tmp_path, responses_path=None)
    engine = SeededEngine()
    run(engine, grading, tmp_path, responses_path=None)
    assert len(engine.calls) == 3
    assert not (tmp_path / "responses.jsonl").exists()


def test_progress_hears_of_old_and_new_responses(grading, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(SeededEngine(dies_after=11), grading, tmp_path)
    heard = []
    run(SeededEngine(), grading, tmp_path, on_response=lambda tokens, new: heard.append((tokens, new)))
    assert heard == [(2, False)] * 11 + [(2, True)] * 13


def test_a_full_disk_ends_the_evaluation_with_its_own_error(grading, tmp_path, monkeypatch):
    def full(self, arrival):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResponseFile, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(SeededEngine(), grading, tmp_path)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_text('{"row": 1}\n{}\n')
    with pytest.raises(ValueError, match="line 1 is not a saved response"):
        ResponseFile(file)


def test_the_first_arrival_of_a_place_stays(tmp_path):
    first = SavedResponse.of(0, 0, Generation([5, EOS], [-0.5, -0.25], "stop", 1, zc_logprob=-3.0))
    with ResponseFile(tmp_path / "responses.jsonl") as arrivals:
        assert arrivals.add(first)
        assert not arrivals.add(replace(first, response_ids=[9, EOS]))
        assert arrivals.missing(0, 3) == [1, 2]
    line = json.loads((tmp_path / "responses.jsonl").read_text())
    assert (line["response_ids"], line["mean_logprob"], line["zc_logprob"]) == ([5, EOS], -0.375, -3.0)
    with ResponseFile(tmp_path / "responses.jsonl") as again:
        assert again.take(0, 1) == [first]
        with pytest.raises(KeyError):
            again.take(0, 1)

"""Generation that ends by scores of prefixes: the responses, places and tokens that whole responses predict."""

import asyncio
import json
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from helpers.tiny_run import TOKENS, write_tiny_run

from megatron_laser.evaluation import evaluate
from megatron_laser.evaluation.benchmarks.folder import claim_benchmark_folder
from megatron_laser.evaluation.benchmarks.run import evaluate_benchmarks
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
from megatron_laser.evaluation.early_ending import EndingEngine
from megatron_laser.evaluation.prefix_rule import AskedPrefixes
from megatron_laser.evaluation.prefix_scores import score_prefixes
from megatron_laser.evaluation.prefix_summary import StopBelow, stop_curve
from megatron_laser.evaluation.records import read_records
from megatron_laser.evaluation.responses import SavedResponse
from megatron_laser.rewards import GradingPool
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.testtime import EngineChoice, TestTimeError, load_model_folder
from megatron_laser.types import Generation, Prompt, SamplingParams

PAINTED = True  # see helpers/pictures.py
EOS, PLUS = TOKENS.index("<eos>"), TOKENS.index("+")
SAMPLING = SamplingParams(2, 12, (EOS,), temperature=0.0, seed=5)
PROMPTS = [[4 + i, 24, 4 + j, 27] for i in range(4) for j in range(3)]
ASKED = ["problems.samples=4", "problems.max_new_tokens=12", "problems.prompt_suffix=''"]
ASKED += ["problems.apply_chat_template=false", "problems.max_prompt_tokens=8", "problems.max_problems=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ending")
    write_tiny_run(folder)
    rows = [{"problem": f"{i} + {j} ?", "answer": str(i + j)} for i in range(3) for j in range(2)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    torch.set_num_threads(1)
    return InProcessEngine(folder, dtype=torch.float32, device=torch.device("cpu"))


def model_of(folder, every=3, delimiter=None):
    asked = AskedPrefixes(None if delimiter else every, delimiter)
    return load_model_folder(folder, score_token="<|score|>", ref_logprob=-3.5, beta=0.5, prefixes=asked)


def ending(engine, rule, threshold):
    return EndingEngine(engine, rule, threshold=threshold, max_positions=64)


def scores_of(engine, rule, prompt, ids):
    """{tokens: score} of a whole response."""
    places = rule.places(ids)
    values = rule.rule.read(engine, [prompt + ids[:place] for place in places], deadline=60) if places else []
    return dict(zip(places, map(rule.rule.score, values), strict=True))


@pytest.mark.parametrize(("every", "delimiter"), [(3, None), (5, None), (None, "+")])
def test_greedy_responses_end_where_the_whole_ones_say(folder, engine, every, delimiter):
    """Temperature 0: what was not ended is the whole response, and what was is its beginning up to the right place."""
    rule = model_of(folder, every, delimiter).prefix
    prompts = [[*prompt, *extra] for prompt in PROMPTS for extra in ([], [PLUS], [27, 9])]
    whole = engine.generate(prompts, SAMPLING, deadline=60)
    known = [
        scores_of(engine, rule, prompt, group[0].response_ids.tolist())
        for prompt, group in zip(prompts, whole, strict=True)
    ]
    everything = sorted(score for each in known for score in each.values())
    assert len(everything) >= 6, "hardly any place"
    middle = len(everything) // 2
    threshold = (everything[middle - 1] + everything[middle]) / 2
    assert everything[middle] - everything[middle - 1] > 1e-5  # else rounding decides
    found = ending(engine, rule, threshold).generate(prompts, SAMPLING, deadline=60)
    ended = 0
    for scores, expected, group in zip(known, whole, found, strict=True):
        place = next((tokens for tokens, score in scores.items() if score < threshold), None)
        ids = expected[0].response_ids.tolist()
        for generation in group:  # greedy: both samples are one response
            assert generation.response_ids.tolist() == ids[:place]
            assert generation.finish_reason == ("ended" if place else expected[0].finish_reason)
            assert generation.logprobs == pytest.approx(expected[0].logprobs[:place], abs=1e-4)
        ended += place is not None
    assert 0 < ended < len(prompts)


def test_stretches_are_sampled_behind_all_that_is_there(folder, engine):
    """With nothing ended, each token's log-prob is the model's behind prompt and response so far, and no stretch
    repeats the random numbers of the one before."""
    rule = model_of(folder).prefix
    sampling = replace(SAMPLING, temperature=1.0, samples_per_prompt=4)
    found = ending(engine, rule, -1e9).generate(PROMPTS, sampling, deadline=60)
    assert {len(group) for group in found} == {4}
    flat = [(prompt, one) for prompt, group in zip(PROMPTS, found, strict=True) for one in group]
    assert {one.finish_reason for _, one in flat} <= {"stop", "length"}
    assert all((one.finish_reason == "stop") == (one.response_ids[-1] == EOS) for _, one in flat)
    long = [(prompt, one) for prompt, one in flat if len(one.response_ids) >= 6]
    for prompt, one in long[:6]:
        ids = one.response_ids.tolist()
        for place, token in enumerate(ids):
            (value,) = engine.score([prompt + ids[:place]], token, deadline=60)
            assert value == pytest.approx(float(one.logprobs[place]), abs=1e-4)
    stretches = [one.response_ids[:6].reshape(2, 3).tolist() for _, one in long]
    assert sum(first == second for first, second in stretches) <= len(stretches) // 10
    samples = {tuple(one.response_ids.tolist()) for _, one in flat}
    assert len(samples) > 0.8 * len(flat)
    again = ending(engine, rule, -1e9).generate(PROMPTS, sampling, deadline=60)
    assert again == found  # equal calls give equal responses


def test_sampled_frequencies_are_those_of_responses_in_one_piece(folder, engine):
    rule = model_of(folder, every=1).prefix
    sampling = SamplingParams(1500, 2, (EOS,), seed=3)
    counts = []
    for source in (engine, ending(engine, rule, -1e9)):
        (group,) = source.generate([PROMPTS[0]], sampling, deadline=120)
        second = [int(one.response_ids[1]) for one in group if len(one.response_ids) == 2]
        counts.append(np.bincount(second, minlength=len(TOKENS)))
    whole, pieces = counts
    # Two samples of one distribution: chi-square with 27 degrees of freedom is below 60 but in 3 of 10 000 cases.
    assert ((whole - pieces) ** 2 / np.maximum(whole + pieces, 1)).sum() < 60
    assert min(whole.sum(), pieces.sum()) > 1200


def test_what_was_read_of_prefixes_comes_with_the_response_and_is_not_asked_for_again(folder, engine):
    rule = model_of(folder).prefix
    found = ending(engine, rule, -1e9).generate(PROMPTS[:2], replace(SAMPLING, temperature=1.0), deadline=60)

    class Silent:
        def score(self, sequences, token_id, *, deadline):
            raise AssertionError("the values came with the responses")

    prompts = [Prompt(row, "", "1", ids) for row, ids in enumerate(PROMPTS[:2])]
    saved = [
        [SavedResponse.of(row, s, one) for s, one in enumerate(group)] for row, group in enumerate(found)
    ]
    kept = score_prefixes(Silent(), rule, prompts, saved, deadline=60)
    bare = [[replace(one, prefix_reads=None) for one in group] for group in saved]
    asked = score_prefixes(engine, rule, prompts, bare, deadline=60)
    assert [[one.tokens for one in group] for group in kept] == [
        [rule.places(r.response_ids) for r in g] for g in saved
    ]
    assert any(one.tokens for group in kept for one in group)
    for one, other in zip(chain(*kept), chain(*asked), strict=True):
        assert one.tokens == other.tokens and one.scores == pytest.approx(other.scores, abs=1e-4)


class Scripted:
    """In place of an engine's requests: answers given beforehand, and nothing is ever ended."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def generate(self, ids, sampling, place):
        ids, reason = self.answers.pop(0)
        return Generation(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.float32), reason, 0)

    async def score(self, ids, token_ids, place):
        return [0.0] * len(token_ids)

    async def close(self):
        pass

    def begun(self, samples):
        pass

    ended = begun

    def __call__(self, engine, sampling, **_):
        self.ended = lambda: None
        return self


@pytest.mark.parametrize(
    ("answers", "expected", "reason"),
    [
        (
            [([5, 6, 7], "length"), ([8, 9], "stop")],
            [5, 6, 7, 8, 9],
            "stop",
        ),  # an end that servers alone know
        ([([5, 6, 7], "length"), ([8], "length")], [5, 6, 7, 8], "length"),  # a server without more room
        ([([5, 6, 7], "length"), ([8, EOS], "stop")], [5, 6, 7, 8, EOS], "stop"),
    ],
)
def test_a_response_ends_where_a_server_would_have_ended_the_whole_one(
    folder, engine, answers, expected, reason, monkeypatch
):
    source = ending(engine, model_of(folder).prefix, -1e9)
    scripted = Scripted(*answers)
    monkeypatch.setattr("megatron_laser.evaluation.early_ending.requests_to", scripted)
    ((found,),) = source.generate([[4, 5]], replace(SAMPLING, samples_per_prompt=1), deadline=20)
    assert (found.response_ids.tolist(), found.finish_reason) == (expected, reason)
    assert not scripted.answers and len(found.prefix_reads) == 1


def test_what_cannot_be_read_to_its_end_is_refused_before_anything_is_generated(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("megatron_laser.evaluation.benchmarks.run._longest_sequence", lambda *_: 15)
    with pytest.raises(
        TestTimeError, match=r"problems: the longest prompt \+ max_new_tokens \+ 1 = 17 .* 15 tokens"
    ):
        run(folder, tmp_path / "out", stop=StopBelow((0.2,), True))


def test_it_stops_when_told_and_at_the_end_of_time(folder, engine):
    rule, stop = model_of(folder).prefix, StopEarly()
    # sampled and long: when the first one ends, others go on
    sampling = replace(SAMPLING, temperature=1.0, max_new_tokens=50)

    def first(*_):
        stop.set()

    with pytest.raises(StoppedEarly):
        ending(engine, rule, -1e9).generate(PROMPTS, sampling, deadline=60, on_finished=first, stop=stop)
    stop.on_set(lambda: None)  # the callbacks of a call that has ended do no harm
    with pytest.raises(TimeoutError):
        ending(engine, rule, -1e9).generate(PROMPTS, SAMPLING, deadline=0.0)
    with pytest.raises(RuntimeError):  # nothing runs any more
        asyncio.get_running_loop()


def run(folder, output, *overrides, model=None, stop=None, **options):
    reward = f"problems.reward={folder / 'lucky.py'}:lucky"
    benchmarks = load_benchmarks(folder / "problems.jsonl", [*ASKED, reward, *overrides])
    options = {"deadline": 120.0, "workers": 1} | options
    return evaluate_benchmarks(
        model or model_of(folder), benchmarks, EngineChoice(max_batch_size=16), output, stop=stop, **options
    )


def records_of(output):
    return [json.loads(line) for line in (output / "problems" / "records.jsonl").read_text().splitlines()]


def test_a_greedy_evaluation_that_ends_agrees_with_the_curve_of_the_whole_one(folder, tmp_path):
    greedy = ["problems.temperature=0", "problems.samples=2"]
    whole = run(folder, tmp_path / "whole", *greedy)["benchmarks"]["problems"]
    scores = sorted(score for record in records_of(tmp_path / "whole") for score in record["prefix_scores"])
    low, high = max(pairwise(scores), key=lambda pair: pair[1] - pair[0])
    stop = StopBelow(((low + high) / 2,))
    never, row = stop_curve(read_records(tmp_path / "whole" / "problems" / "records.jsonl"), stop.thresholds)
    assert never["accuracy"]["value"] == pytest.approx(whole["summary"]["accuracy"])
    assert row["ended"] > 0
    ended = run(folder, tmp_path / "ended", *greedy, stop=replace(stop, end_early=True))
    found = ended["benchmarks"]["problems"]
    counted = found["prefix"]["ended"]
    tokens = sum(record["response_ids_length"] for record in records_of(tmp_path / "whole"))
    assert counted["ended"] == round(row["ended"] * counted["responses"])
    assert 1 - counted["tokens"] / tokens == pytest.approx(row["tokens_saved"])
    assert found["summary"]["accuracy"] == pytest.approx(row["accuracy"]["value"])
    for record in records_of(tmp_path / "ended"):
        if record["finish_reason"] == "ended":  # and its grade was asked of nobody
            assert (record["reward"], record["outcome"], record["extracted"]) == (0.0, "ended", None)
            assert record["prefix_tokens"][-1] == record["response_ids_length"]
            assert record["prefix_scores"][-1] < stop.thresholds[0] and record["score"] is None
        else:
            assert all(score >= stop.thresholds[0] for score in record["prefix_scores"])
    report = (tmp_path / "ended" / "report.md").read_text()
    assert (
        f"{counted['tokens']} tokens were generated" in report and "| behind token | scored there" in report
    )
    with pytest.raises(TestTimeError, match=r"holds responses of another evaluation.*ended_below"):
        run(folder, tmp_path / "ended", *greedy)
    with pytest.raises(TestTimeError, match=r"holds responses of another evaluation.*ended_below"):
        run(folder, tmp_path / "ended", *greedy, stop=StopBelow((9.0,), True))


def test_interrupted_and_started_again_it_has_the_same_records(folder, engine, tmp_path):
    model = model_of(folder)
    middle = float(np.median([s for prompt in PROMPTS for s in first_scores(engine, model, prompt)]))
    prompts = [Prompt(row, "", "1", ids) for row, ids in enumerate(PROMPTS)]

    def go(name, engine=engine):
        evaluate(
            ending(engine, model.prefix, middle),
            prompts,
            sampling=SamplingParams(4, 12, (EOS,), seed=7),
            decode=model.decode,
            grading=pool,
            rule=model.rule,
            records_path=tmp_path / name / "records.jsonl",
            responses_path=tmp_path / name / "responses.jsonl",
            deadline=60.0,
            generation_batch=16,
            prefixes=model.prefix,
        )
        return (tmp_path / name / "records.jsonl").read_bytes()

    with GradingPool(workers=1) as pool:
        whole = go("whole")
        (tmp_path / "cut").mkdir()
        kept = (tmp_path / "whole" / "responses.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "cut" / "responses.jsonl").write_bytes(b"".join(kept[:19]) + kept[19][:30])
        assert go("cut") == whole
    assert whole.count(b'"finish_reason": "ended"') > 4


def first_scores(engine, model, prompt):
    (group,) = engine.generate([prompt], replace(SAMPLING, temperature=1.0), deadline=60)
    found = [scores_of(engine, model.prefix, prompt, one.response_ids.tolist()) for one in group]
    return [scores[3] for scores in found if 3 in scores]


def test_prefixes_are_in_records_results_report_and_figure_and_others_are_judged_anew(folder, tmp_path):
    plain = replace(model_of(folder), prefix=None)
    run(folder, tmp_path, model=plain)
    before = (tmp_path / "problems" / "records.jsonl").read_bytes()
    responses = (tmp_path / "problems" / "responses.jsonl").read_bytes()
    assert b"prefix" not in before + (tmp_path / "results.json").read_bytes()

    said = []
    detail = run(folder, tmp_path, say=said.append)["benchmarks"]["problems"]["prefix"]
    assert said[0] == "problems: prefix changed: judging the saved responses anew"
    assert (tmp_path / "problems" / "responses.jsonl").read_bytes() == responses
    assert detail["rule"]["every"] == 3 and [row["first"] for row in detail["by_position"]] == [3, 6, 9]
    lengths = [len(json.loads(line)["response_ids"]) for line in responses.splitlines()]
    assert [row["responses"] for row in detail["by_position"]] == [
        sum(length > place for length in lengths) for place in (3, 6, 9)
    ]
    assert [row["threshold"] for row in detail["stop_below"]] == [None, 0.1, 0.2, 0.3, 0.4, 0.5]
    report = (tmp_path / "report.md").read_text()
    assert "### Scores while generating" in report and "| never | 0.0% |" in report
    assert (tmp_path / "plots" / "problems_prefixes.png").stat().st_size > 10_000
    for record in records_of(tmp_path):
        assert record["prefix_tokens"] == [k for k in (3, 6, 9) if k < record["response_ids_length"]]
        assert len(record["prefix_scores"]) == len(record["prefix_tokens"])

    # and without prefixes again
    settings = json.loads((tmp_path / "problems" / "settings.json").read_text())
    del settings["prefix"]
    told = claim_benchmark_folder(tmp_path / "problems", settings, regrade=False)
    assert told == "prefix changed: judging the saved responses anew"

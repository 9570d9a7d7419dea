"""`eval`, `score` and the proxy against a real server: what they say is what the model says in this process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import openai
import pytest
from helpers.sglang_server import router_before
from helpers.torchrun import worker_environment
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.testtime import EngineChoice, Scorer, load_model_folder, open_engine

pytestmark = pytest.mark.sglang

SCORE = ["--score-token", "<|score|>", "--ref-logprob", "-3.5", "--beta", "0.5"]
SETTINGS = ["problems.samples=8", "problems.max_new_tokens=40", "problems.prompt_suffix=''"]
SETTINGS += ["problems.apply_chat_template=false", "problems.max_prompt_tokens=8"]
RESPONSES = 20 * 8


@pytest.fixture(scope="module")
def server(sglang_server):
    """The shared server with the weights of its model folder, whatever others gave it."""
    body = {"model_path": str(sglang_server.model), "flush_cache": True}
    assert sglang_server.call("/update_weights_from_disk", body)["success"]
    rows = [{"problem": f"{i} + {j} ?", "answer": str(i + j)} for i in range(5) for j in range(4)]
    (sglang_server.model / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sglang_server


@pytest.fixture(scope="module")
def own_scores(server):
    """Scores [answers] that the same weights give in this process to (prompt ids, response ids)."""
    folder = load_model_folder(server.model, score_token="<|score|>", ref_logprob=-3.5, beta=0.5)

    def scores(pairs):
        with open_engine(EngineChoice(max_batch_size=64), folder, deadline=60) as engine:
            return [found.score for found in Scorer(engine, folder).score_ids(pairs, deadline=60)]

    return scores


def command(server, name, *arguments):
    reward = f"problems.reward={server.model / 'lucky.py'}:lucky"
    settings = [*SETTINGS, reward] if name == "eval" else []
    return [name, str(server.model), *map(str, arguments), *settings, *SCORE, "--url", server.url]


def environment(server):
    return {"MEGATRON_LASER_API_KEY": server.api_key or ""}


def invoke(server, name, *arguments):
    result = CliRunner().invoke(app, command(server, name, *arguments), env=environment(server))
    assert result.exit_code == 0, result.output
    return result.output


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_that_was_killed_goes_on_and_its_scores_are_the_models(server, own_scores, tmp_path):
    output, problems = tmp_path / "eval", server.model / "problems.jsonl"
    arguments = command(server, "eval", problems, "--output", output, "--concurrency", "4", "--workers", "1")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_laser", *arguments],
            env=worker_environment() | environment(server),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    responses = output / "problems" / "responses.jsonl"
    try:
        until = time.monotonic() + 240
        while not responses.exists() or responses.read_bytes().count(b"\n") < 10:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = responses.read_bytes()
    assert 10 <= kept.count(b"\n") < RESPONSES and not (output / "results.json").exists()

    invoke(server, "eval", problems, "--output", output, "--workers", "1")
    found = responses.read_bytes()
    assert found.startswith(kept[: kept.rfind(b"\n") + 1])
    results = (output / "results.json").read_bytes()
    summary = json.loads(results)["benchmarks"]["problems"]["summary"]
    assert summary["num_responses"] == RESPONSES and 0 < summary["num_scored"] <= RESPONSES

    prompts = {row: [4 + row // 4, 24, 4 + row % 4, 27] for row in range(20)}
    answers = {(answer["row"], answer["sample"]): answer["response_ids"] for answer in lines(responses)}
    scored = {
        (record["row"], record["sample"]): record["score"]
        for record in lines(output / "problems" / "records.jsonl")
        if record["score"] is not None
    }
    ours = own_scores([(prompts[place[0]], answers[place]) for place in scored])
    assert list(scored.values()) == pytest.approx(ours, abs=1e-4)

    said = invoke(server, "eval", problems, "--output", output, "--workers", "1")
    assert "all responses were there" in said
    assert (output / "results.json").read_bytes() == results and responses.read_bytes() == found


def test_scores_of_a_file_are_those_of_the_model_in_this_process(server, own_scores, tmp_path):
    source = tmp_path / "answers.jsonl"
    answers = [
        {"prompt_ids": [4 + i, 5, 24], "response_ids": [6, 7 + i, *range(8, 8 + i), 1]} for i in range(12)
    ]
    source.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    said = invoke(server, "score", source, "--output", tmp_path / "theirs.jsonl")
    assert "12 with a score" in said
    theirs = [row["score"] for row in lines(tmp_path / "theirs.jsonl")]
    ours = own_scores([(answer["prompt_ids"], answer["response_ids"]) for answer in answers])
    assert None not in theirs and theirs == pytest.approx(ours, abs=1e-4)


def test_a_finished_evaluation_is_scored_and_verified_by_the_server(server, own_scores, tmp_path):
    output = tmp_path / "eval"
    invoke(server, "eval", server.model / "problems.jsonl", "--output", output, "--workers", "1")
    invoke(server, "score", output, "--output", tmp_path / "scored.jsonl")
    rows = lines(tmp_path / "scored.jsonl")
    records = lines(output / "problems" / "records.jsonl")
    answers = {
        (a["row"], a["sample"]): a["response_ids"] for a in lines(output / "problems" / "responses.jsonl")
    }
    forced = [record for record in records if record["forced_score"] is not None]
    assert forced and all(record["score"] is None and record["extracted"] is not None for record in forced)
    ours = own_scores(
        [
            (
                [4 + record["row"] // 4, 24, 4 + record["row"] % 4, 27],
                [*answers[record["row"], record["sample"]], 1],
            )
            for record in forced
        ]
    )
    assert [record["forced_score"] for record in forced] == pytest.approx(ours, abs=1e-4)
    for name in ("score", "forced_score"):
        for row, record in zip(rows, records, strict=True):
            assert row[name] == pytest.approx(record[name], abs=1e-4)

    template = tmp_path / "prompt.txt"
    template.write_text("{problem} {response}")
    arguments = [output, "--template", template, "--right-pattern", r"\b1\b", "--wrong-pattern", r"\b2\b"]
    arguments += ["--max-new-tokens", 8, "--no-chat-template", "--output", tmp_path / "verified.jsonl"]
    shared = ["verify", str(server.model), *map(str, arguments), "--url", server.url]
    result = CliRunner().invoke(app, shared, env=environment(server))
    assert result.exit_code == 0, result.output
    verified = lines(tmp_path / "verified.jsonl")
    assert len(verified) == RESPONSES and {len(row["verdict_texts"]) for row in verified} == {1}
    assert f"{RESPONSES} verdicts" in result.output and not list(tmp_path.glob(".*.verdicts"))


def test_through_a_router_an_evaluation_has_all_responses_and_scores(server, own_scores, tmp_path):
    with router_before(server, tmp_path / "router.log") as router:
        through = ["--workers", "1", "--router", router.url]
        invoke(server, "eval", server.model / "problems.jsonl", "--output", tmp_path / "eval", *through)
        passed_on = router.generated()
        source = tmp_path / "eval" / "problems" / "records.jsonl"
        records = [record for record in lines(source) if record["score"] is not None]
        found = lines(source.with_name("responses.jsonl"))
        answers = {(answer["row"], answer["sample"]): answer["response_ids"] for answer in found}
        rows = [
            {
                "prompt_ids": [4 + record["row"] // 4, 24, 4 + record["row"] % 4, 27],
                "response_ids": answers[record["row"], record["sample"]],
            }
            for record in records
        ]
        asked = tmp_path / "asked.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        invoke(server, "score", asked, "--output", tmp_path / "scored.jsonl", "--router", router.url)
        assert router.generated() == passed_on + len(rows)
    assert len(answers) == len(found) == RESPONSES and passed_on >= RESPONSES
    evaluated = [record["score"] for record in records]
    assert [row["score"] for row in lines(tmp_path / "scored.jsonl")] == pytest.approx(evaluated, abs=1e-4)
    assert evaluated == pytest.approx(
        own_scores([(row["prompt_ids"], row["response_ids"]) for row in rows]), abs=1e-4
    )


def test_the_proxy_answers_an_openai_client_with_what_the_server_generates(server, own_scores, tmp_path):
    arguments = command(server, "score", "--serve", "--port", "0", "--k", "4", "--max-new-tokens", "20")
    arguments += ["--no-chat-template", "--model-name", "tiny"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_laser", *arguments],
        env=worker_environment() | environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        url = address_of(process)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "1 + 2 ?"}],
            extra_body={"return_samples": True, "k": 16},
        )
        samples = answer.laser["samples"]
        assert answer.laser["k"] == len(samples) == 16
        chosen = samples[answer.laser["chosen"]]
        assert (answer.choices[0].message.content, answer.choices[0].score) == (
            chosen["content"],
            chosen["score"],
        )
        finished = [sample for sample in samples if sample["score"] is not None]
        assert finished
        ours = own_scores([([5, 24, 6, 27], sample["response_ids"]) for sample in finished])
        assert [sample["score"] for sample in finished] == pytest.approx(ours, abs=1e-4)

        said, ended = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "1 + 2 ?"}], stream=True
        )
        assert said.choices[0].delta.content is not None and ended.choices[0].finish_reason in (
            "stop",
            "length",
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def address_of(process, seconds=120.0):
    """What the proxy says it listens on."""
    found, said = [], []

    def read():
        for line in process.stdout:
            said.append(line)
            words = [word for word in line.split() if word.startswith("http://127.0.0.1")]
            if words and "/v1" in line:
                found.append(words[0].rstrip(".,;").removesuffix("/v1"))

    threading.Thread(target=read, daemon=True).start()
    until = time.monotonic() + seconds
    while not found:
        assert process.poll() is None and time.monotonic() < until, "".join(said)
        time.sleep(0.05)
    return found[0]


def test_prefixes_are_scored_and_end_generation_where_the_whole_responses_say(server, tmp_path):
    """Greedy, so that both evaluations have one response to each problem, whole and ended."""
    settings = ["problems.temperature=0", "problems.max_problems=8", "--prefix-every", "8", "--workers", "1"]
    source = server.model / "problems.jsonl"
    invoke(server, "eval", source, *settings, "--output", tmp_path / "whole")
    whole = lines(tmp_path / "whole" / "problems" / "records.jsonl")
    answers = {
        (a["row"], a["sample"]): a["response_ids"]
        for a in lines(tmp_path / "whole" / "problems" / "responses.jsonl")
    }
    pairs = [
        ((record["row"], record["sample"]), place, score)
        for record in whole
        for place, score in zip(record["prefix_tokens"], record["prefix_scores"], strict=True)
    ]
    model = load_model_folder(server.model, score_token="<|score|>", ref_logprob=-3.5, beta=0.5)
    sequences = [
        [4 + row // 4, 24, 4 + row % 4, 27, *answers[row, sample][:place]]
        for (row, sample), place, _ in pairs
    ]
    with open_engine(EngineChoice(max_batch_size=64), model, deadline=60) as engine:
        ours = model.rule.read(engine, sequences, deadline=60)
    found = [score for *_, score in pairs]
    assert len(found) >= 64 and found == pytest.approx([model.rule.score(value) for value in ours], abs=1e-4)

    scores = sorted(found)
    middle = scores[len(scores) // 4 : -len(scores) // 4]
    low, high = max(pairwise(middle), key=lambda pair: pair[1] - pair[0])
    threshold = (low + high) / 2
    ending = ["--stop-below", threshold, "--end-early", "--output", tmp_path / "ended"]
    invoke(server, "eval", source, *settings, *ending)
    ended = lines(tmp_path / "ended" / "problems" / "records.jsonl")
    kept = {
        (a["row"], a["sample"]): a["response_ids"]
        for a in lines(tmp_path / "ended" / "problems" / "responses.jsonl")
    }
    for record, other in zip(whole, ended, strict=True):
        places = zip(record["prefix_tokens"], record["prefix_scores"], strict=True)
        place = next((tokens for tokens, score in places if score < threshold), None)
        key = (record["row"], record["sample"])
        assert kept[key] == answers[key][:place]
        assert other["finish_reason"] == ("ended" if place else record["finish_reason"])
    assert 0 < sum(record["finish_reason"] == "ended" for record in ended) < len(ended)

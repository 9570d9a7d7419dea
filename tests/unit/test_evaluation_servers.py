"""Evaluations on servers: which weights they hold, whether those stay, and what is said while they are awaited."""

import json
import socket
import threading
import time
from dataclasses import replace

import pytest
from helpers.faulty_server import SCORE, STOP, FaultyServer, open_engine
from helpers.tiny_run import write_tiny_run
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.evaluation.benchmarks.run import evaluate_benchmarks
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
from megatron_laser.evaluation.pinned_weights import PinnedWeights
from megatron_laser.evaluation.weight_identity import WeightsChanged
from megatron_laser.report import benchmark_report
from megatron_laser.rollout.client.errors import ServerGone, ServerMismatch
from megatron_laser.rollout.client.health import State
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.testtime import EngineChoice, TestTimeError, load_model_folder
from megatron_laser.types import SamplingParams

SETTINGS = ["problems.samples=4", "problems.max_new_tokens=8", "problems.prompt_suffix=''"]
SETTINGS += ["problems.apply_chat_template=false", "problems.max_prompt_tokens=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    write_tiny_run(folder)
    (folder / "problems.jsonl").write_text('{"problem": "1 + 2 ?", "answer": "3"}\n')
    return folder


@pytest.fixture
def server():
    server = FaultyServer()
    server.weights = "a" * 64
    yield server
    server.stop()


def model_of(folder):
    return load_model_folder(folder, score_token=SCORE, ref_logprob=-8.0, beta=0.5, stop_token_ids=(STOP,))


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch):
    """Gives (what results.json holds, what was said)."""
    monkeypatch.setattr(benchmark_report, "_figures", lambda *_: [])

    def run(*servers):
        said = []
        choice = EngineChoice(urls=tuple(server.url for server in servers), wait=20.0)
        benchmarks = load_benchmarks(folder / "problems.jsonl", SETTINGS)
        output = tmp_path / "eval"
        evaluate_benchmarks(
            model_of(folder), benchmarks, choice, output, deadline=30.0, workers=1, say=said.append
        )
        return json.loads((output / "results.json").read_text()), "\n".join(said)

    return run


def test_a_server_with_newer_weights_is_asked_anew_and_one_with_the_same_is_not(server, evaluate):
    first, _ = evaluate(server)
    asked = len(server.generations)
    again, said = evaluate(server)
    assert again == first and len(server.generations) == asked and "all responses were there" in said
    server.version = "a-new-name"  # for the same weights
    assert evaluate(server)[0] == first and len(server.generations) == asked
    server.weights = "b" * 64  # under the same name
    second, said = evaluate(server)
    assert "answering anew" in said and len(server.generations) == 2 * asked == 8
    assert second["weights"] != first["weights"]


def test_weights_that_a_server_gets_under_an_evaluation_are_noticed(server, evaluate, tmp_path):
    def send_others(body):
        server.weights = "b" * 64
        return False

    server.holds = send_others
    with pytest.raises(WeightsChanged, match=r"engine's weights were changed .*problems\.old-1"):
        evaluate(server)
    assert not (tmp_path / "eval" / "results.json").exists()
    found, _ = evaluate(server)
    assert found["benchmarks"]["problems"]["summary"]["num_responses"] == 4


def test_a_server_that_is_gone_has_not_changed_its_weights(server, folder):
    other = FaultyServer()
    other.weights = server.weights
    choice = EngineChoice(urls=(server.url, other.url), wait=20.0)
    try:
        with PinnedWeights(choice, model_of(folder), deadline=30.0) as weights:
            first, second = weights.engine().fleet.members
            second.health = replace(second.health, state=State.DEAD, version=None)
            assert not weights.seem_changed()
            weights.check()
            first.health = replace(first.health, state=State.SUSPECT)
            with pytest.raises(ServerGone, match="none can be asked"):
                weights.check()
            first.health = replace(first.health, version="other")
            assert weights.seem_changed()
    finally:
        other.stop()


def test_responses_of_a_server_that_does_not_tell_its_weights_are_not_reused(server, evaluate, caplog):
    server.weights = None
    first, _ = evaluate(server)
    assert first["weights"] is None and "does not say which weights it holds" in caplog.text
    evaluate(server)
    assert len(server.generations) == 8


def test_servers_with_different_weights_are_no_one_model(server, evaluate):
    other = FaultyServer()
    try:
        other.weights = "b" * 64
        with pytest.raises(ServerMismatch, match=r"its weights are not those of .*two models"):
            evaluate(server, other)
        other.weights = server.weights
        evaluate(server, other)
    finally:
        other.stop()


def test_scores_of_two_models_are_not_written(server, folder, tmp_path, monkeypatch):
    source, target = tmp_path / "answers.jsonl", tmp_path / "scored.jsonl"
    source.write_text(json.dumps({"prompt_ids": [5, 6], "response_ids": [6, STOP]}) + "\n")
    arguments = ["score", folder, source, "--output", target, "--url", server.url, "--score-token", SCORE]
    arguments += ["--ref-logprob", "-8", "--no-chat-template"]
    assert CliRunner().invoke(app, list(map(str, arguments))).exit_code == 0
    before = target.read_bytes()

    def send_others(body):
        server.weights = "b" * 64
        return False

    server.holds = send_others
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2 and "weights were changed while they were in use" in result.output
    assert target.read_bytes() == before


def test_servers_stop_generating_at_once_when_they_are_told_to(server):
    server.holds = lambda body: len(server.requests) > 2
    engine = open_engine(server)
    try:
        stop, heard = StopEarly(), []
        threading.Timer(0.3, stop.set).start()
        sampling = SamplingParams(samples_per_prompt=4, max_new_tokens=8, stop_token_ids=(STOP,))
        with pytest.raises(StoppedEarly):
            engine.generate(
                [[5]], sampling, deadline=60, on_finished=lambda *one: heard.append(one), stop=stop
            )
        assert len(heard) == 2 and len(server.aborted) >= 2
        started = time.monotonic()
        with pytest.raises(StoppedEarly):
            engine.generate([[5]], sampling, deadline=60, stop=stop)
        assert time.monotonic() - started < 2.0
    finally:
        engine.close()


def test_a_port_at_which_nobody_listens_is_said_at_once_and_given_up_soon(folder, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        choice = EngineChoice(urls=(url,), wait=1.5)
        started = time.monotonic()
        with pytest.raises(TestTimeError, match=r"0 of 1 servers answered within 1\.5 s.*--wait") as found:
            PinnedWeights(choice, model_of(folder), deadline=86400.0).__enter__()
        assert time.monotonic() - started < 10.0
    assert url in str(found.value) and "is the server up?" in str(found.value)
    (said,) = [record for record in caplog.records if "waiting up to" in record.message]
    assert url in said.message and "up to 1.5 s for 1 server" in said.message
    assert time.time() - said.created > 1.0  # at once, not at the end

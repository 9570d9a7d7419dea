"""The proxy through the openai client: answers with scores, and proper errors for what it cannot do."""

import asyncio
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from aiohttp import web
from helpers.tiny_run import write_tiny_run

from megatron_laser.rewards import GradingPool
from megatron_laser.testtime import TestTimeError, load_model_folder
from megatron_laser.testtime.proxy import ProxySettings, make_application, run_proxy
from megatron_laser.types import Generation

KEY = "a-key"
EOS = 1


class ScriptedEngine:
    """Samples in turn: 7 with a low score twice, 8 with a high one, one cut off. Ids: boxed 25, 7 is 11, } is 26."""

    def __init__(self):
        self.calls = []
        self.scored = 0
        self.delay = 0.0
        self.fails = None

    def generate(self, prompts, sampling, *, deadline, on_finished=None):
        self.calls.append((prompts, sampling))
        time.sleep(self.delay)
        if self.fails is not None:
            raise self.fails
        script = [
            Generation([25, 11, 26, EOS], [-0.1] * 4, "stop", 0, zc_logprob=-4.8),
            Generation([25, 11, 26, EOS], [-0.1] * 4, "stop", 0, zc_logprob=-4.6),
            Generation([25, 12, 26, EOS], [-0.1] * 4, "stop", 0),
            Generation([25, 13], [-0.1] * 2, "length", 0),
        ]
        return [[script[i % 4] for i in range(sampling.samples_per_prompt)] for _ in prompts]

    def score(self, sequences, token_id, *, deadline):
        assert token_id == 2
        self.scored += len(sequences)
        return [-3.2] * len(sequences)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxy")
    write_tiny_run(folder)
    return load_model_folder(folder, score_token="<|score|>", ref_logprob=-5.0, beta=0.5)


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine()


@pytest.fixture(scope="module")
def url(model, engine):
    """The proxy's address; it runs in a thread of its own."""
    settings = ProxySettings(
        "tiny", api_key=KEY, k=4, max_k=16, max_new_tokens=16, apply_chat_template=False, deadline=3.0
    )
    loop, started, address = asyncio.new_event_loop(), threading.Event(), []
    with GradingPool(workers=1) as pool:

        async def start():
            runner = web.AppRunner(make_application(model, [engine], pool, settings))
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            started.set()
            return runner

        def serve():
            asyncio.set_event_loop(loop)
            runner = loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert started.wait(30)
        yield address[0]
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20)


def ask(client, content="1 + 6 ?", **options):
    messages = options.pop("messages", [{"role": "user", "content": content}])
    return client.chat.completions.create(**({"model": "tiny", "messages": messages} | options))


def test_the_answer_that_the_scores_elect_comes_with_its_score(client, engine):
    before = engine.scored
    answer = ask(client, extra_body={"return_samples": True})
    choice = answer.choices[0]
    # 7 has two votes of 0.1 and 0.2; 8 has one of 0.9
    assert choice.message.content == "\\boxed{ 8 }"
    assert choice.score == pytest.approx(0.9) and choice.finish_reason == "stop"
    assert engine.scored == before + 1  # only the one that came without
    laser = answer.laser
    assert (laser["method"], laser["answer"], laser["k"], laser["chosen"]) == ("weighted_majority", "8", 4, 2)
    assert laser["vote_share"] == pytest.approx(0.9 / 1.2)
    assert [sample["answer_class"] for sample in laser["samples"]] == [0, 0, 1, None]
    assert [sample["response_ids"][1] for sample in laser["samples"]] == [11, 11, 12, 13]
    assert laser["samples"][3]["score"] is None and laser["samples"][3]["finish_reason"] == "length"
    assert answer.usage.completion_tokens == 14 and answer.usage.prompt_tokens == 4


@pytest.mark.parametrize(
    ("key", "content_type", "body", "status", "message"),
    [
        (
            KEY.encode(),
            "application/json",
            rb'{"model": "tiny", "messages": [%s]}',
            400,
            "half of a surrogate pair",
        ),
        (
            KEY.encode(),
            "application/json; charset=none",
            rb'{"model": "tiny"}',
            400,
            "not JSON: unknown encoding",
        ),
        (b"a-key\xff", "application/json", rb"{}", 401, "the API key is missing or wrong"),
    ],
)
def test_bytes_that_are_no_text_are_the_clients_fault(url, key, content_type, body, status, message):
    body = body.replace(b"%s", rb'{"role": "user", "content": "1 \ud83d"}')
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n"
        % len(body)
    )
    head += b"Content-Type: %s\r\nAuthorization: Bearer %s\r\n\r\n" % (content_type.encode(), key)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head + body)
        with connection.makefile("rb") as answer:
            text = answer.read().decode()
    assert text.startswith(f"HTTP/1.1 {status} ") and message in text


def test_a_request_chooses_k_vote_and_sampling(client, engine):
    answer = ask(
        client, temperature=0.5, top_p=0.9, seed=3, max_tokens=5, extra_body={"k": 8, "vote": "majority"}
    )
    assert answer.choices[0].message.content == "\\boxed{ 7 }"
    assert answer.laser["method"] == "majority" and answer.laser["samples"] is None
    prompts, sampling = engine.calls[-1]
    assert prompts == [[5, 24, 10, 27]]
    assert (sampling.samples_per_prompt, sampling.max_new_tokens, sampling.seed) == (8, 5, 3)
    assert (sampling.temperature, sampling.top_p, sampling.score_token_id) == (0.5, 0.9, 2)


def test_a_seed_that_the_servers_would_ignore_is_refused(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "takes_seeds", False, raising=False)
    calls = len(engine.calls)
    with pytest.raises(openai.BadRequestError, match="ignore seeds") as caught:
        ask(client, seed=3)
    assert caught.value.param == "seed" and len(engine.calls) == calls
    ask(client)
    assert engine.calls[-1][1].seed is None


def test_one_sample_is_simply_answered(client):
    answer = ask(client, extra_body={"k": 1})
    assert answer.choices[0].message.content == "\\boxed{ 7 }" and answer.choices[0].score == pytest.approx(
        0.1
    )


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"extra_body": {"k": 0}}, "k"),
        ({"extra_body": {"k": -3}}, "k"),
        ({"extra_body": {"k": 17}}, "k"),
        ({"extra_body": {"k": "many"}}, "k"),
        ({"extra_body": {"k": True}}, "k"),
        ({"extra_body": {"vote": "best"}}, "vote"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "1"}]}, "messages"),
        ({"content": "1 <|score|> ?"}, "messages"),
        ({"content": "1 " * 100}, "messages"),
        ({"temperature": 9.0}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stop": ["7"]}, "stop"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "extra_body": {"k": 0}}, "k"),
        ({"extra_body": {"return_samples": "no"}}, "return_samples"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_parameter(client, engine, options, parameter):
    calls = len(engine.calls)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert caught.value.status_code == 400 and caught.value.param == parameter
    assert caught.value.type == "invalid_request_error"
    assert len(engine.calls) == calls  # nothing was sampled


def test_an_unknown_parameter_is_refused_with_the_nearest_and_harmless_ones_are_taken(client):
    with pytest.raises(openai.BadRequestError, match=r"unknown; did you mean `return_samples`\?"):
        ask(client, extra_body={"return_sample": True})
    answer = ask(client, user="somebody", metadata={"a": "b"}, store=False, parallel_tool_calls=True)
    assert answer.choices[0].message.content == "\\boxed{ 8 }"


def test_a_stream_has_the_answer_of_the_vote_in_one_piece(client, engine):
    calls = len(engine.calls)
    chunks = list(
        ask(client, stream=True, stream_options={"include_usage": True}, extra_body={"return_samples": True})
    )
    assert len(engine.calls) == calls + 1
    said, ended, counted = chunks
    assert said.object == "chat.completion.chunk" and said.model == "tiny"
    assert {chunk.id for chunk in chunks} == {said.id}
    assert said.choices[0].delta.role == "assistant" and said.choices[0].delta.content == "\\boxed{ 8 }"
    assert said.choices[0].finish_reason is None and said.choices[0].score == pytest.approx(0.9)
    assert said.laser["answer"] == "8" and len(said.laser["samples"]) == 4
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].delta.content is None
    assert counted.choices == [] and counted.usage.completion_tokens == 14
    plain = list(ask(client, stream=True))
    assert len(plain) == 2 and plain[1].usage is None


def test_a_stream_that_fails_before_its_first_word_has_a_status(client, engine):
    engine.fails = TimeoutError("generation: 2 of 4 responses still running")
    try:
        with pytest.raises(openai.InternalServerError, match="no answer within 3 s") as caught:
            ask(client, stream=True)
    finally:
        engine.fails = None
    assert caught.value.status_code == 504


def test_a_client_that_hangs_up_is_no_failure_of_the_server(url, client, engine, caplog):
    calls = len(engine.calls)
    engine.delay = 0.5
    try:
        body = b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "1 + 6 ?"}]}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as connection:
            connection.sendall(head.encode() + body)
            until = time.monotonic() + 20
            while len(engine.calls) == calls and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        engine.delay = 0.0
    assert ask(client).choices[0].message.content == "\\boxed{ 8 }"
    assert len(engine.calls) == calls + 2 and not caplog.records


def test_an_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'") as caught:
        ask(client, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert [card.id for card in client.models.list()] == ["tiny"]


def test_a_wrong_key_is_a_401_and_health_needs_none(url):
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0))
    with urllib.request.urlopen(f"{url}/health", timeout=10) as reply:
        assert reply.status == 200


def test_broken_bodies_and_paths_have_json_errors_too(url):
    def status_of(path, data):
        request = urllib.request.Request(url + path, data=data, headers={"Authorization": f"Bearer {KEY}"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert b'"error"' in caught.value.read()
        return caught.value.code

    assert status_of("/v1/chat/completions", b"{not json") == 400
    assert status_of("/v1/chat/completions", b"[1]") == 400
    assert status_of("/v1/embeddings", b"{}") == 404
    assert status_of("/v1/chat/completions", b" " * (5 * 2**20)) == 413


def test_an_engine_that_fails_is_a_500_and_one_that_is_late_a_504_and_the_next_request_is_answered(
    client, engine
):
    engine.fails = ValueError("weights are gone")
    with pytest.raises(openai.InternalServerError, match="its log says why"):
        ask(client)
    engine.fails = TimeoutError("generation: 2 of 4 responses still running")
    with pytest.raises(openai.InternalServerError, match="no answer within 3 s") as caught:
        ask(client)
    assert caught.value.status_code == 504
    engine.fails = None
    assert ask(client).choices[0].message.content == "\\boxed{ 8 }"


def test_requests_that_come_together_are_answered_one_after_the_other(client, engine):
    engine.delay = 0.2
    try:
        results = []
        threads = [threading.Thread(target=lambda: results.append(ask(client))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        engine.delay = 0.0
    assert [answer.choices[0].message.content for answer in results] == ["\\boxed{ 8 }"] * 4


def test_only_loopback_may_go_without_a_key():
    for host in ("127.0.0.1", "::1", "localhost"):
        assert ProxySettings("tiny", host=host).host == host
    for host in ("0.0.0.0", "10.0.0.4", "example.org"):
        with pytest.raises(TestTimeError, match="MEGATRON_LASER_PROXY_KEY"):
            ProxySettings("tiny", host=host)
        assert ProxySettings("tiny", host=host, api_key=KEY).host == host


def test_settings_that_cannot_work_are_refused():
    for options, message in (({"k": 0}, "--k 0"), ({"k": 65}, "--max-k 64"), ({"port": 70000}, "--port")):
        with pytest.raises(TestTimeError, match=message):
            ProxySettings("tiny", **options)


def test_a_taken_port_is_said_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TestTimeError, match=rf"--port {port}: Address already in use"):
            run_proxy(None, None, ProxySettings("tiny", port=port), say=print)

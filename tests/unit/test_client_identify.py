"""An address that is no server for this run is refused at once, with what is wrong and what to do about it."""

import json
import socket
import threading
import time
from dataclasses import replace

import pytest
from helpers.plain_http import answering

from megatron_laser.rollout.client import identify as identity
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerMismatch, ServerRefused, ServersLost
from megatron_laser.rollout.client.identify import Expected, mismatches
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.rollout.engine import takes_seeds
from megatron_laser.rollout.sglang_api import MIN_SGLANG, server_facts

EXPECTED = Expected(
    152, model_type="qwen2", dtype="bfloat16", longest=100, sizes={"vocab_size": 152, "hidden_size": 64}
)
LONG = 600.0  # a start deadline that no test waits for


def open_engine(*urls, expected=EXPECTED, start_deadline=LONG, **settings):
    """What a run does first with its servers."""
    endpoints = [ServerEndpoint(url) for url in urls]
    engine = SglangEngine(
        lambda: endpoints, api_key=None, expected=expected, start_deadline=start_deadline, **settings
    )
    engine.close()


def sglang(info=None, server=None, vocabulary=152, seen=None):
    """The answers of an SGLang server of `vocabulary` tokens, with changes."""

    def answer(path, body):
        if seen is not None:
            seen.append((path, body))
        if path == "/v1/loads":
            return {"loads": []}
        if path == "/model_info":
            known = {"model_path": "/remote/m", "model_type": "qwen2", "weight_version": "default"}
            return known | {"is_generation": True} | (info or {})
        if path == "/server_info":
            known = {"version": "0.5.23", "dtype": "bfloat16", "tp_size": 2, "max_req_input_len": 100}
            return known | (server or {})
        if path == "/generate":
            (token,) = body["token_ids_logprob"]
            if token >= vocabulary:
                message = f"out-of-vocabulary token id {token}; valid range is [0, {vocabulary})."
                return 400, {"error": {"message": message}}
            return {"output_ids": [], "meta_info": {}}
        return 404, {"detail": "Not Found"}

    return answer


def test_a_server_that_fits_is_taken():
    with answering(sglang()) as url:
        open_engine(url)


STRANGERS = {
    "404 to everything": lambda path, body: (404, "<html>no such page</html>"),
    "a page for everything": lambda path, body: "<!doctype html><title>Welcome</title>",
    "empty answers": lambda path, body: "",
    "an OpenAI server": lambda path, body: (
        {"data": [{"id": "m"}]} if path.startswith("/v1/") else (404, {"detail": "Not Found"})
    ),
    "JSON of another kind": lambda path, body: {"status": "ok"},
    "a list": lambda path, body: [],
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_is_no_sglang_server_is_refused_long_before_the_start_deadline(kind):
    started = time.monotonic()
    with answering(STRANGERS[kind]) as url, pytest.raises(ServerMismatch) as error:
        open_engine(url)
    assert time.monotonic() - started < 60
    message = str(error.value)
    needed = ".".join(map(str, MIN_SGLANG))
    assert url in message
    assert f"this is no SGLang server, or one older than {needed}, which is needed" in message


def test_a_key_that_is_refused_names_the_setting():
    with (
        answering(lambda path, body: (401, "Unauthorized")) as url,
        pytest.raises(ServerRefused, match=r"answered 401.*rollout\.sglang\.api_key_env") as error,
    ):
        open_engine(url)
    assert url in str(error.value)


def test_an_address_on_which_nobody_listens_ends_at_the_start_deadline_with_the_reason():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # taken, but not listened on
        with pytest.raises(ServersLost) as error:
            open_engine(url, start_deadline=0.5)
    message = str(error.value)
    assert message.startswith("0 of 1 servers answered within 0.5 s: ") and url in message
    assert "Connect call failed" in message


def test_a_server_that_still_starts_is_waited_for():
    asked = []
    ready = sglang()

    def answer(path, body):
        asked.append(path)
        return (503, "starting") if len(asked) < 2 else ready(path, body)

    with answering(answer) as url:
        open_engine(url)
    assert len(asked) >= 4


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"server": {"version": "0.5.9"}}, ["SGLang 0.5.9; 0.5.23 or newer is needed"]),
        ({"server": {"version": "0.4.10.post2"}}, ["SGLang 0.4.10.post2; 0.5.23 or newer is needed"]),
        ({"server": {"version": ""}}, ["SGLang of unknown version; 0.5.23 or newer is needed"]),
        ({"info": {"model_type": "llama"}}, ["serves a llama model from /remote/m", "model.path is a qwen2"]),
        ({"info": {"is_generation": False}}, ["an embedding model"]),
        (
            {"server": {"dtype": "float16"}},
            ["computes in float16, model.dtype is bfloat16", "--dtype bfloat16"],
        ),
        (
            {"server": {"max_req_input_len": 99}},
            ["takes 99 tokens", "data.max_prompt_tokens + rollout.max_new_tokens is 100", "--context-length"],
        ),
        (
            {"vocabulary": 151},
            ["its vocabulary is smaller than the 152 tokens of model.path", "[0, 151)", "model.path"],
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_server_that_does_not_fit_the_trainer_is_refused(changes, parts):
    with answering(sglang(**changes)) as url, pytest.raises(ServerMismatch) as error:
        open_engine(url)
    assert url in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_one_of_several_servers_that_does_not_fit_is_named():
    with answering(sglang()) as good, answering(sglang(server={"version": "0.5.9"})) as old:
        with pytest.raises(ServerMismatch) as error:
            open_engine(good, old, min_servers=2)
        assert old in str(error.value) and good not in str(error.value)


def test_newer_and_longer_and_padded_servers_fit():
    for changes in (
        {"server": {"version": "0.6.0rc1"}},
        {"server": {"version": "1.0"}},
        {"server": {"max_req_input_len": 100_000}},
        {"server": {"dtype": "torch.bfloat16"}},
        {"vocabulary": 256},
    ):
        with answering(sglang(**changes)) as url:
            open_engine(url)


def test_the_vocabulary_is_asked_for_without_generating_and_by_a_token_that_every_model_has():
    seen = []
    with answering(sglang(seen=seen)) as url:
        open_engine(url)
    ((_, body),) = [(path, body) for path, body in seen if path == "/generate"]
    assert body["input_ids"] == [0] and body["token_ids_logprob"] == [151]
    assert body["sampling_params"]["max_new_tokens"] == 0


def test_a_paused_server_is_no_reason_to_wait(monkeypatch):
    """A run that was killed while it gave weights leaves its servers paused: they keep requests, and fit."""
    monkeypatch.setattr(identity, "_VOCABULARY_SECONDS", 0.2)
    go_on = threading.Event()
    ready = sglang()

    def answer(path, body):
        if path == "/generate":
            go_on.wait(60)
        return ready(path, body)

    with answering(answer) as url:
        open_engine(url)
        go_on.set()


class TestAModelFolderThatBothSee:
    def info(self, tmp_path, **config):
        whole = {"model_type": "qwen2", "vocab_size": 152, "hidden_size": 64} | config
        (tmp_path / "config.json").write_text(json.dumps(whole))
        return {"model_path": str(tmp_path)}

    def test_a_model_of_another_size_is_refused_with_the_numbers(self, tmp_path):
        info = self.info(tmp_path, hidden_size=32, vocab_size=160)
        with answering(sglang(info=info)) as url, pytest.raises(ServerMismatch) as error:
            open_engine(url)
        assert f"its model {tmp_path} has vocab_size 160 instead of 152, hidden_size 32 instead of 64" in str(
            error.value
        )

    @pytest.mark.parametrize("tied", [True, False])
    def test_ties_that_are_not_the_trainers_are_refused(self, tmp_path, tied):
        expected = replace(EXPECTED, tied=tied)
        with answering(sglang(info=self.info(tmp_path, tie_word_embeddings=tied))) as url:
            open_engine(url, expected=expected)
        other = self.info(tmp_path, **({} if tied else {"tie_word_embeddings": True}))
        with (
            answering(sglang(info=other)) as url,
            pytest.raises(ServerMismatch, match=f"says tie_word_embeddings {str(not tied).lower()}"),
        ):
            open_engine(url, expected=expected)

    def test_quantized_weights_take_no_plain_ones(self, tmp_path):
        info = self.info(tmp_path, quantization_config={"quant_method": "fp8"})
        with answering(sglang(info=info)) as url:
            open_engine(url, expected=replace(EXPECTED, dtype=None))  # who sends no weights may ask it
            with pytest.raises(ServerMismatch, match="has a quantization_config"):
                open_engine(url)

    def test_it_tells_the_vocabulary_so_that_no_request_is_needed(self, tmp_path):
        seen = []
        with answering(sglang(info=self.info(tmp_path), seen=seen)) as url:
            open_engine(url)
        assert "/generate" not in [path for path, _ in seen]

    def test_a_server_that_names_its_vocabulary_is_not_asked_either(self):
        seen = []
        with answering(sglang(server={"vocab_size": 152}, seen=seen)) as url:
            open_engine(url)
        assert "/generate" not in [path for path, _ in seen]
        with (
            answering(sglang(server={"vocab_size": 151})) as url,
            pytest.raises(ServerMismatch, match=r"smaller than the 152 tokens of model\.path \(it has 151\)"),
        ):
            open_engine(url)

    def test_a_vocabulary_that_is_too_small_is_refused_where_nothing_else_is_known(self, tmp_path):
        with (
            answering(sglang(info=self.info(tmp_path))) as url,
            pytest.raises(ServerMismatch, match=r"smaller than the 153 tokens of model\.path \(it has 152\)"),
        ):
            open_engine(url, expected=Expected(153))


@pytest.mark.parametrize(
    "option", [{"enable_hierarchical_cache": True}, {"moe_runner_backend": "flashinfer_trtllm"}]
)
def test_a_server_that_would_report_wrong_experts_is_refused_where_they_are_replayed(option):
    (name,) = option
    with answering(sglang(server=option)) as url:
        open_engine(url)
        with pytest.raises(ServerMismatch, match=f"its option {name}: .*moe.routing_replay"):
            open_engine(url, expected=replace(EXPECTED, routing=True))
    plain = {"enable_hierarchical_cache": False, "moe_runner_backend": "auto"}
    with answering(sglang(server=plain)) as url:
        open_engine(url, expected=replace(EXPECTED, routing=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_whether_a_server_takes_seeds_is_asked_and_required_on_request(deterministic, tmp_path):
    server = {"enable_deterministic_inference": deterministic, "vocab_size": 152}
    with answering(sglang(server=server)) as url:
        engine = SglangEngine.connect([url], api_key=None, expected=EXPECTED, deadline=30)
        assert engine.takes_seeds == takes_seeds(engine) == deterministic
        engine.close()
        wanted = replace(EXPECTED, deterministic=True)
        if deterministic:
            open_engine(url, expected=wanted)
        else:
            with pytest.raises(
                ServerMismatch, match=r"ignores seeds; start it with .*\(rollout\.sglang\.determ"
            ):
                open_engine(url, expected=wanted)


def test_a_server_that_samples_otherwise_than_it_is_asked_to_is_refused():
    with (
        answering(
            sglang(info={"preferred_sampling_params": {"top_k": 20}}, server={"vocab_size": 152})
        ) as url,
        pytest.raises(
            ServerMismatch, match=r"--preferred-sampling-params \{'top_k': 20\}, which change what it"
        ),
    ):
        open_engine(url)


def test_all_that_differs_is_told_at_once():
    facts = server_facts(
        {"model_type": "llama", "is_generation": True},
        {"version": "0.5.1", "dtype": "float32", "max_req_input_len": 5},
    )
    problems = mismatches(facts, EXPECTED)
    assert len(problems) == 4


def test_a_score_token_outside_the_vocabulary_reaches_no_server():
    seen = []
    with answering(sglang(seen=seen)) as url:
        engine = SglangEngine.connect([url], api_key=None, expected=Expected(152), deadline=30)
        try:
            before = [path for path, _ in seen].count("/generate")
            with pytest.raises(ValueError, match="token id 152; expected 0 to 151, the model's vocabulary"):
                engine.score([[4, 5]], 152, deadline=5)
            assert [path for path, _ in seen].count("/generate") == before
        finally:
            engine.close()


def test_a_server_that_fits_at_last_may_catch_up_by_itself_again():
    with answering(sglang()) as url:
        engine = SglangEngine(
            lambda: [ServerEndpoint(url)], api_key=None, expected=EXPECTED, start_deadline=LONG
        )
        try:
            member = engine.fleet.members[0]
            member.device, member.unfit = None, True  # refused once, and started again at the same address
            engine.identify_late()
            assert member.identified and not member.unfit
        finally:
            engine.close()

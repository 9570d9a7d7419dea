"""The shared server is a real one, and answers what everything else builds on."""

import stat
import subprocess
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sglang_server import call

from megatron_laser.rollout.endpoints import read_endpoints
from megatron_laser.rollout.server_load import parse_load
from megatron_laser.rollout.sglang_api import LOADS

# its start counts as part of the first test that asks for it
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]


def test_it_answers_token_ids_with_log_probs(sglang_server):
    reply = sglang_server.call(
        "/generate",
        {
            "input_ids": [5, 24, 6, 27],
            "sampling_params": {"max_new_tokens": 4, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "token_ids_logprob": [2],
        },
    )
    info = reply["meta_info"]
    assert len(reply["output_ids"]) == len(info["output_token_logprobs"]) == 4
    assert [entry[1] for entry in info["output_token_logprobs"]] == reply["output_ids"]
    assert all(position[0][1] == 2 for position in info["output_token_ids_logprobs"])


def test_it_tells_that_a_request_runs_and_that_none_does(sglang_server):
    def load():
        found = parse_load(sglang_server.call(LOADS))
        assert found is not None
        return found

    def until(holds):
        deadline = time.monotonic() + 60.0
        while not holds(load()):
            assert time.monotonic() < deadline, load()
            time.sleep(0.005)

    def generate():
        """One request after the other, of as many tokens as the model has positions for."""
        parameters = {"max_new_tokens": 56, "temperature": 1.0, "ignore_eos": True}
        while not seen.is_set():
            sglang_server.call("/generate", {"input_ids": [5, 24, 6, 27], "sampling_params": parameters})

    seen = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        requests = threads.submit(generate)
        try:
            until(lambda told: told.running == 1.0 and told.kv_usage > 0.0)
        finally:
            seen.set()
        requests.result(timeout=60)
    until(lambda told: told.running == 0.0)


def test_it_refuses_whoever_has_no_key(sglang_server):
    for key in (None, "wrong"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            call(sglang_server.url, "/model_info", api_key=key)


def test_the_key_is_in_no_command_line_and_in_no_file_that_others_can_read(sglang_server):
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sglang.launch_server" in listing
    assert sglang_server.api_key not in listing
    files = [file for file in sglang_server.endpoints.parent.rglob("*") if file.is_file()]
    holders = [file for file in files if sglang_server.api_key in file.read_text(errors="replace")]
    assert sglang_server.endpoints in holders
    assert [file for file in holders if stat.S_IMODE(file.stat().st_mode) & 0o077] == []


def test_serve_has_published_it(sglang_server):
    (server,) = read_endpoints(sglang_server.endpoints).servers
    assert (server.url, server.pid, server.start, server.state) == (
        sglang_server.url,
        sglang_server.pid,
        1,
        "ready",
    )

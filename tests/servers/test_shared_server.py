"""The shared server is a real one, and answers what everything else builds on."""

import stat
import subprocess
import urllib.error

import pytest
from helpers.sglang_server import call

from megatron_laser.rollout.endpoints import read_endpoints

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

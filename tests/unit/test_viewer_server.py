"""The viewer's server: who gets what, and what the browser is told to keep out."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from helpers.synthetic_run import write_synthetic_run
from helpers.torchrun import ROOT

from megatron_laser.viewer.api import Viewer, ViewError
from megatron_laser.viewer.server import ViewerServer

TOKEN = "right-token"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    (folder / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "lib").mkdir()
    (folder / "lib" / "charts.js").write_text("let a = 1;\n" * 1000)
    (folder / "notes.md").write_text("not for browsers")
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, web: Path) -> Iterator[ViewerServer]:
    folder = write_synthetic_run(tmp_path_factory.mktemp("run"), steps=40, responses=80, mean_length=20)
    viewer = Viewer([folder])
    viewer.read_responses()
    server = ViewerServer(viewer, port=0, token=TOKEN, web=web)
    server.start()
    yield server
    server.close()
    viewer.close()


def ask(
    server: ViewerServer, path: str, *, method: str = "GET", token: str | None = TOKEN, **headers: str
) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    if token is not None:
        headers["X-Token"] = token
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.mark.parametrize(
    "path", ["runs", "curves?run=0", "responses?run=0", "response?run=0&id=3", "events?run=0"]
)
def test_data_is_given_for_the_token_alone(server: ViewerServer, path: str) -> None:
    for token in (None, "", "wrong", TOKEN + "x"):
        answer, body = ask(server, f"/api/{path}", token=token)
        assert answer.status == 401 and "token" in json.loads(body)["error"]
    assert ask(server, f"/api/{path}")[0].status == 200
    separator = "&" if "?" in path else "?"
    assert ask(server, f"/api/{path}{separator}token={TOKEN}", token=None)[0].status == 200
    assert ask(server, f"/api/{path}{separator}token=%C3%A9", token=None)[0].status == 401


def test_what_the_server_says_is_what_the_viewer_answers(server: ViewerServer) -> None:
    found = json.loads(ask(server, "/api/curves?run=0&names=reward_mean,lr")[1])
    assert found["steps"] == list(range(1, 41)) and list(found["values"]) == ["reward_mean", "lr"]
    assert json.loads(ask(server, "/api/step?run=0&step=3")[1])["spans"]
    answer, body = ask(server, "/api/step?run=0&step=99")
    assert answer.status == 404 and "no step 99" in json.loads(body)["error"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8650", "[", ""])
def test_a_request_that_names_another_host_is_refused(server: ViewerServer, host: str) -> None:
    for path in ("/", "/api/runs"):
        assert ask(server, path, Host=host)[0].status == 403
    for own in ("localhost:9000", "127.0.0.1", f"127.0.0.1:{server.port}", "[::1]:80"):
        assert ask(server, "/api/version", Host=own)[0].status == 200


def test_what_is_no_address_is_said_to_be_none(server: ViewerServer) -> None:
    assert ask(server, "x://[/")[0].status == 400


def test_an_answer_that_is_no_json_is_an_error_that_the_page_can_show(
    server: ViewerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Viewer, "answer", lambda self, path, query: {"half a character": "\ud800"})
    answer, body = ask(server, "/api/runs")
    assert answer.status == 500 and "surrogates" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/lib/../../secret.txt",
        "//etc/passwd",
        "/link.txt",
        "/notes.md",
        "/lib",
    ],
)
def test_no_path_leads_out_of_the_pages_folder(server: ViewerServer, path: str) -> None:
    answer, body = ask(server, path)
    assert answer.status == 404 and b"secret" not in body


def test_the_page_may_load_nothing_from_elsewhere(server: ViewerServer) -> None:
    answer, body = ask(server, f"/?token={TOKEN}", token=None)
    assert answer.status == 200 and b"<title>page" in body
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert "http" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_scripts_are_packed_for_those_who_take_it(server: ViewerServer, web: Path) -> None:
    plain, body = ask(server, "/lib/charts.js")
    assert plain.headers["Content-Type"] == "text/javascript; charset=utf-8"
    packed, small = ask(server, "/lib/charts.js", Accept_Encoding="gzip, br")
    assert packed.headers["Content-Encoding"] == "gzip" and len(small) < len(body) / 10
    assert gzip.decompress(small) == body == (web / "lib" / "charts.js").read_bytes()
    head, nothing = ask(server, "/lib/charts.js", method="HEAD")
    assert (head.status, nothing, head.headers["Content-Length"]) == (200, b"", str(len(body)))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(server: ViewerServer, method: str) -> None:
    assert ask(server, "/api/runs", method=method)[0].status == 501


def test_a_port_that_is_taken_is_named_and_the_default_gives_way_to_the_next(
    server: ViewerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = server._server.RequestHandlerClass.viewer  # type: ignore[attr-defined]
    with pytest.raises(
        ViewError, match=rf"port {server.port}: Address already in use; choose another --port"
    ):
        ViewerServer(viewer, port=server.port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("megatron_laser.viewer.server.DEFAULT_PORT", taken.getsockname()[1])
        other = ViewerServer(viewer)
        assert other.port > taken.getsockname()[1]
        other.close()
    with pytest.raises(ViewError, match="65535"):
        ViewerServer(viewer, port=70000)


def test_on_an_address_that_others_reach_numbers_and_the_machines_names_are_hosts(
    server: ViewerServer,
) -> None:
    viewer = server._server.RequestHandlerClass.viewer  # type: ignore[attr-defined]
    other = ViewerServer(viewer, host="0.0.0.0", port=0, token=TOKEN)
    other.start()
    assert (
        not other.is_private and server.is_private and f"//{socket.gethostname()}:{other.port}/" in other.url
    )
    for host, status in (("10.0.0.7:80", 200), (socket.gethostname(), 200), ("evil.example", 403)):
        assert ask(other, "/api/version", Host=host)[0].status == status
    other.close()
    assert ask(server, "/api/version", Host="10.0.0.7")[0].status == 403


def test_each_start_has_a_token_of_its_own(server: ViewerServer) -> None:
    viewer = server._server.RequestHandlerClass.viewer  # type: ignore[attr-defined]
    servers = [ViewerServer(viewer, port=0) for _ in range(2)]
    assert servers[0].token != servers[1].token and len(servers[0].token) >= 32
    assert servers[0].token in servers[0].url
    for one in servers:
        one.close()


def test_the_command_prints_its_address_and_ends_quietly_on_ctrl_c(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path, steps=3, responses=8, mean_length=10)
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_laser", "view", str(folder), "--port", "0", "--no-open"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them, and so their children, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split()[-1]
        port, token = int(address.split(":")[2].split("/")[0]), address.split("token=")[1]
        deadline = time.monotonic() + 20
        while True:
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/api/runs", headers={"X-Token": token})
            found = json.loads(connection.getresponse().read())
            if found["runs"][0]["indexed"] or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert found["runs"][0]["num_responses"] == 8
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, ""), (out, errors)

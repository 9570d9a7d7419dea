"""IPv6 in addresses: in brackets wherever a client reads them, without where a socket does."""

import socket
from contextlib import nullcontext

import pytest

from megatron_laser.config.addresses import host_and_port, http_url
from megatron_laser.evaluation.engine_choice import EngineChoice
from megatron_laser.testtime import proxy as serving
from megatron_laser.testtime.proxy import ProxySettings
from megatron_laser.weight_sync.group import reachable_address


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8100"),
        ("node7", "http://node7:8100"),
        ("::1", "http://[::1]:8100"),
        ("[fd00::5]", "http://[fd00::5]:8100"),
    ],
)
def test_a_host_and_its_port_as_an_address_and_back(host, url):
    assert http_url(host, 8100) == url
    assert host_and_port(url) == (host.strip("[]"), 8100)


def test_an_address_without_a_port_has_its_schemes():
    assert host_and_port("http://node7") == ("node7", 80)
    assert host_and_port("https://[::1]/v1") == ("::1", 443)


@pytest.mark.parametrize(
    "url", ["http://::1:8100", "http://[::1:8100", "http://host:x", "http://host:99999", "host:1", "http://"]
)
def test_what_no_client_accepts_is_refused(url):
    with pytest.raises(ValueError, match="with brackets around IPv6"):
        host_and_port(url)


def test_the_trainers_address_towards_a_server():
    assert reachable_address("http://127.0.0.1:30000") == "127.0.0.1"
    assert reachable_address("http://localhost:30000/") in ("127.0.0.1", "::1")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_trainers_address_towards_a_server_by_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 loopback here")
    assert reachable_address("http://[::1]:30000") == "::1"


def test_the_proxy_prints_an_address_that_clients_accept(monkeypatch):
    class Listener:
        def getsockname(self):
            return ("::1", 8124, 0, 0)

    said = []
    monkeypatch.setattr(serving, "listen", lambda host, port: nullcontext(Listener()))
    monkeypatch.setattr(serving, "open_engine", lambda *_, **__: nullcontext())
    monkeypatch.setattr(serving, "GradingPool", lambda **_: nullcontext())
    monkeypatch.setattr(serving, "make_application", lambda *_: None)
    monkeypatch.setattr(serving.web, "run_app", lambda *_, **__: None)
    settings = ProxySettings(model_name="model", host="::1", port=8124)
    serving.run_proxy(None, EngineChoice(), settings, say=said.append)
    assert said == ["model: http://[::1]:8124/v1 (k = 8); Ctrl-C ends it"]

"""The endpoints file: what one side publishes the other reads, and what it must not accept."""

import json
import stat
import threading

import pytest

from megatron_laser.rollout.endpoints import (
    Endpoints,
    EndpointsError,
    ServerEndpoint,
    publish,
    read_endpoints,
)

SERVER = ServerEndpoint(
    "http://10.0.0.5:30000",
    start=2,
    pid=4711,
    state="held",
    torch_version="2.13.0+cu129",
    nccl_version="2.27.5",
    nccl_settings={"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"},
)


def test_what_is_published_is_read(tmp_path):
    written = Endpoints((SERVER,), "http://10.0.0.5:30010", "secret", "/models/m", "0.5.23", updated=12.5)
    publish(tmp_path / "deep" / "endpoints.json", written)
    assert read_endpoints(tmp_path / "deep" / "endpoints.json") == written


def test_only_its_owner_can_read_it_and_nothing_else_is_left_behind(tmp_path):
    file = tmp_path / "endpoints.json"
    for _ in range(2):
        publish(file, Endpoints((SERVER,), api_key="secret"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["endpoints.json"]


def test_the_key_is_not_printed():
    assert "secret" not in repr(Endpoints((SERVER,), api_key="secret"))


def test_a_reader_never_sees_half_a_file(tmp_path):
    file = tmp_path / "endpoints.json"
    many = tuple(ServerEndpoint(f"http://10.0.0.5:{30000 + port}") for port in range(300))
    publish(file, Endpoints(many))
    writer = threading.Thread(target=lambda: [publish(file, Endpoints(many)) for _ in range(30)])
    writer.start()
    while writer.is_alive():
        assert len(read_endpoints(file).servers) == 300
    writer.join()


def test_the_files_of_a_folder_are_merged(tmp_path):
    for node in ("a", "b"):
        publish(tmp_path / f"{node}.json", Endpoints((ServerEndpoint(f"http://node-{node}:1"),), api_key="k"))
    (tmp_path / ".a.json.half").write_text("{")
    (tmp_path / "a.log").write_text("not mine")
    merged = read_endpoints(tmp_path)
    assert [server.url for server in merged.servers] == ["http://node-a:1", "http://node-b:1"]
    assert merged.api_key == "k"


def two_nodes(folder, first, second):
    publish(folder / "a.json", first)
    publish(folder / "b.json", second)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            Endpoints((ServerEndpoint("http://a:1"),)),
            Endpoints((ServerEndpoint("http://a:1"),)),
            "more than one file",
        ),
        (
            Endpoints((ServerEndpoint("http://a:1"),), api_key="x"),
            Endpoints((ServerEndpoint("http://b:1"),), api_key="y"),
            "different API keys",
        ),
        (
            Endpoints((ServerEndpoint("http://a:1"),), router_url="http://a:2"),
            Endpoints((ServerEndpoint("http://b:1"),)),
            "a.json has a router",
        ),
    ],
)
def test_nodes_that_contradict_each_other_are_refused(tmp_path, first, second, message):
    two_nodes(tmp_path, first, second)
    with pytest.raises(EndpointsError, match=message):
        read_endpoints(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({"servers": [{"url": "ftp://x"}]}),
        json.dumps({"servers": [{"url": "http://x", "start": 0}]}),
        json.dumps({"servers": [{"url": "http://x", "state": "odd"}]}),
        json.dumps({"servers": [], "api_key": 7}),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(EndpointsError, match=r"other\.json is not a file of `megatron-laser serve`"):
        read_endpoints(tmp_path / "other.json")


def test_a_missing_file_and_an_empty_folder_say_what_was_expected(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(EndpointsError, match="is it running"):
            read_endpoints(path)

"""Files by which the servers of several nodes are found, and waiting until all of them answer."""

import os
import threading
import time

import pytest
from helpers.serve_runs import write_run

from megatron_laser.config import ConfigError, load_config
from megatron_laser.rollout.servers import ServeError
from megatron_laser.rollout.servers.fleet_plan import endpoints_file, shared_key


def test_the_file_is_named_after_the_node_in_a_folder_and_is_required(tmp_path):
    config = load_config(write_run(tmp_path))
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.endpoints: required by serve"):
        endpoints_file(config, None)
    assert endpoints_file(config, tmp_path / "one.json") == tmp_path / "one.json"
    name = endpoints_file(config, tmp_path / "shared").name
    assert (name, name.startswith(".")) == (f"{os.uname().nodename}.json", False)


def test_serves_of_one_folder_share_a_key(tmp_path):
    assert shared_key(tmp_path) == shared_key(tmp_path)
    assert len(shared_key(tmp_path)) >= 32
    assert (tmp_path / ".api_key").stat().st_mode & 0o077 == 0
    assert list(tmp_path.glob("*")) == [tmp_path / ".api_key"]


def test_waiting_for_servers_ends_when_all_of_all_nodes_answer_or_at_the_deadline(tmp_path):
    from megatron_laser.rollout.endpoints import Endpoints, ServerEndpoint, publish
    from megatron_laser.rollout.servers.launcher import wait_for_servers

    folder = tmp_path / "servers"
    config = load_config(write_run(tmp_path, servers=2, start_deadline=1, endpoints=str(folder)))
    with pytest.raises(ServeError, match="does not exist"):
        wait_for_servers(config, 2, print)
    publish(folder / "a.json", Endpoints((ServerEndpoint("http://a:1"), ServerEndpoint("http://a:2"))))
    starting = ServerEndpoint("http://b:2", state="starting")
    publish(folder / "b.json", Endpoints((ServerEndpoint("http://b:1"), starting)))
    with pytest.raises(ServeError, match="3 of 4 servers answer"):
        wait_for_servers(config, 2, print)
    publish(folder / "b.json", Endpoints((ServerEndpoint("http://b:1"), ServerEndpoint("http://b:2"))))
    said = []
    wait_for_servers(config, 2, said.append)
    assert said[0].startswith("4 of 4 servers answer")


def test_waiting_for_servers_does_not_count_the_file_of_a_node_that_went_down(tmp_path):
    from megatron_laser.rollout.endpoints import Endpoints, ServerEndpoint, publish
    from megatron_laser.rollout.servers.launcher import wait_for_servers

    folder = tmp_path / "servers"
    config = load_config(write_run(tmp_path, start_deadline=1, endpoints=str(folder)))
    publish(folder / "a.json", Endpoints((ServerEndpoint("http://a:1"),)))
    yesterday = time.time() - 86400
    publish(folder / "b.json", Endpoints((ServerEndpoint("http://b:1"),), updated=yesterday))
    with pytest.raises(
        ServeError, match=r"1 of 2 servers answer; .*b\.json was last written 864.. s ago"
    ) as error:
        wait_for_servers(config, 2, print)
    assert "delete it if that node serves no longer" in str(error.value)

    # a clock that is a day behind, but a serve that runs: it writes its file again
    again = threading.Timer(
        0.2, publish, (folder / "b.json", Endpoints((ServerEndpoint("http://b:1"),), updated=yesterday + 30))
    )
    again.start()
    wait_for_servers(config, 2, print)
    again.join()

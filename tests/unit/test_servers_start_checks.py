"""What a run with servers finds wrong with its own process before anything expensive."""

import pytest
from helpers.runs import run_config

from megatron_laser.config import ConfigError
from megatron_laser.rollout.servers.start_checks import check_start

DEBUG = "TORCH_DISTRIBUTED_DEBUG"


@pytest.fixture
def config(tmp_path):
    def make(**rollout):
        return run_config(tmp_path, tmp_path / "model", rollout={"engine": "sglang", **rollout})

    return make


def test_debugged_collectives_with_servers_in_the_group_are_refused(config, monkeypatch):
    monkeypatch.setenv(DEBUG, "detail")
    with pytest.raises(
        ConfigError, match=rf"rollout\.weight_sync: distributed with {DEBUG}=detail: .* unset {DEBUG}"
    ):
        check_start(config())
    check_start(config(weight_sync="disk"))
    check_start(config(engine="in_process"))
    monkeypatch.setenv(DEBUG, "INFO")
    check_start(config())


def test_too_few_open_files_are_found_before_a_model_is_built(config, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (1000, 1000))
    with pytest.raises(ConfigError, match=r"max_concurrency_per_server: 256 requests at once on each of 3 "):
        check_start(config(sglang={"servers": 3}))
    with pytest.raises(ConfigError, match=r"256 requests at once on each of 4 "):
        check_start(config(sglang={"urls": [f"http://10.0.0.{host}:3000" for host in range(4)]}))
    check_start(config(sglang={"servers": 2}))
    check_start(config(engine="in_process"))

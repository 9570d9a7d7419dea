"""What a real server answers when it is asked whether it fits the trainer."""

import pytest

from megatron_laser.rollout.client import identify as identity
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import ServerMismatch, ServerRefused
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint

pytestmark = pytest.mark.sglang


def open_engine(server, expected, api_key=None):
    endpoint = ServerEndpoint(server.url)
    SglangEngine(lambda: [endpoint], api_key=api_key or server.api_key, expected=expected).close()


@pytest.mark.parametrize("seen", [True, False], ids=["from its model folder", "by asking it"])
def test_a_vocabulary_that_is_too_small_is_found_and_the_server_lives_on(seen, sglang_server, monkeypatch):
    if not seen:
        monkeypatch.setattr(identity, "_config_of", lambda path: {})
    with pytest.raises(ServerMismatch, match=r"its vocabulary is smaller than the 29 tokens of model\.path"):
        open_engine(sglang_server, Expected(29, "qwen2", "float32"))
    open_engine(sglang_server, Expected(28, "qwen2", "float32"))


def test_a_model_of_another_size_is_refused_with_the_numbers(sglang_server):
    with pytest.raises(ServerMismatch, match=r"hidden_size \d+ instead of 7"):
        open_engine(sglang_server, Expected(28, "qwen2", "float32", sizes={"hidden_size": 7}))


def test_a_wrong_key_names_the_setting(sglang_server):
    with pytest.raises(ServerRefused, match=r"answered 401.*rollout\.sglang\.api_key_env"):
        open_engine(sglang_server, Expected(28), api_key="wrong")

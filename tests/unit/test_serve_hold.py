"""A server that came back waits for weights, but never for those that it has been given already."""

import asyncio

import pytest
from helpers.faulty_server import FaultyServer

from megatron_laser.rollout.serving.probe import Prober


@pytest.mark.parametrize(("version", "held"), [("default", True), ("run-3", False)])
def test_a_server_is_held_only_while_it_has_the_first_weights(version, held):
    """run-3: the run has updated and continued it between the question for its version and the pause."""
    server = FaultyServer()
    server.version = version

    async def hold():
        prober = Prober(None)
        try:
            return await prober.hold(server.url, "default")
        finally:
            await prober.close()

    try:
        assert asyncio.run(hold()) is held
        assert server.paused is held
    finally:
        server.stop()

"""What can go wrong between a run and its servers. Every message names the server and the phase."""

from __future__ import annotations

from megatron_laser.errors import UserError


class ServerError(RuntimeError):
    """A server did not do what it was asked to.

    Attributes:
        url: the server.
        phase: what was asked of it.
        gone: the connection could not be made or broke: the server may have died.
    """

    gone = False

    def __init__(self, url: str, phase: str, message: str) -> None:
        super().__init__(f"server {url}, {phase}: {message}")
        self.url = url
        self.phase = phase
        self.message = message


class ServerGone(UserError, ServerError):
    """Nobody listens, or the connection broke before a whole answer came."""

    gone = True


class ServerTimeout(ServerError):
    """No answer within the deadline."""


class ServerFault(ServerError):
    """The server answered with an error of its own (5xx) or with something that is no answer."""


class UnexpectedAnswer(ServerFault):
    """The server answered in full, but not as an SGLang server does."""


class ServerBusy(ServerFault):
    """Not now (408, 429, 503): it starts, its queue is full, or a router has no server. Says nothing of its health."""


class OutOfFiles(ServerBusy):
    """This process, or this machine, has too many open files for one more connection. Says nothing of the server."""


class ServerRefused(UserError, ServerError):
    """The server refused the request (4xx, `status`): the same request would be refused again."""

    def __init__(self, url: str, phase: str, message: str, status: int = 400) -> None:
        super().__init__(url, phase, message)
        self.status = status


class ServerMismatch(UserError, ServerError):
    """The server is no SGLang server, too old, or serves another model than the one that is trained."""


class StaleServer(ServerError):
    """The server answered with other weights than those it should hold."""


class ServersLost(UserError, RuntimeError):
    """Fewer healthy servers than `rollout.min_servers`, for longer than `rollout.servers_deadline`."""


class WeightsNeeded(RuntimeError):
    """Too few servers hold the current weights, but enough are up to be given them: sync again, then go on."""

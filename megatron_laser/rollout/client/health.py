"""What a run believes about one server: a pure state machine, fed with events and a clock.

    starting    loads its model; silence is normal until the start deadline
    healthy     takes work, if it holds the wanted weights
    suspect     missed a probe or failed a request: no new work until it answers again
    draining    finishes what it has, takes nothing new
    updating    is given new weights; silence is normal
    dead        its process or port is gone, or it was silent for too long
    restarting  came back after death (a new process): as starting, until it answers

A server that restarted holds the weights of its model folder: it is healthy, but its version is not the wanted one,
so it takes no work before it has been synced.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """See the module's text."""

    STARTING = "starting"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DRAINING = "draining"
    UPDATING = "updating"
    DEAD = "dead"
    RESTARTING = "restarting"


@dataclass(frozen=True, slots=True)
class Answered:
    """A probe was answered; `version` is the server's name of its weights."""

    version: str


@dataclass(frozen=True, slots=True)
class Missed:
    """A probe was not answered. `refused`: nobody listens at all."""

    reason: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class RequestDone:
    """A generation or score came back."""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """One did not. `gone`: its connection broke."""

    reason: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Restarted:
    """Whoever runs the servers says that this one has a new process."""


@dataclass(frozen=True, slots=True)
class DrainBegan:
    """It shall take nothing new."""


@dataclass(frozen=True, slots=True)
class UpdateBegan:
    """New weights are on their way to it."""


@dataclass(frozen=True, slots=True)
class UpdateDone:
    """It holds `version` now."""

    version: str


@dataclass(frozen=True, slots=True)
class UpdateFailed:
    """It holds nobody knows what."""

    reason: str


Event = (
    Answered
    | Missed
    | RequestDone
    | RequestFailed
    | Restarted
    | DrainBegan
    | UpdateBegan
    | UpdateDone
    | UpdateFailed
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of silence that are normal: while starting, while updating, and otherwise."""

    start: float
    update: float
    silence: float


_REFUSALS = 3  # probes in a row that nobody listened to: the process is gone


@dataclass(frozen=True, slots=True)
class Health:
    """One server's state.

    Attributes:
        since: when the state was entered; last_alive: when it last answered anything (seconds of any clock).
        version: its name of its weights; None: unknown.
        refusals: probes in a row that found nobody listening.
        reason: why it is suspect or dead, or what its start is waiting for.
        deaths: how often it died.
        distrusted: an update failed on it half-way, or left other weights than the trainer's: whatever name it gives
            its weights, it takes no work before the next update or a new process.
    """

    state: State
    since: float
    last_alive: float
    version: str | None = None
    refusals: int = 0
    reason: str = ""
    deaths: int = 0
    distrusted: bool = False

    @classmethod
    def fresh(cls, now: float) -> Health:
        """A server that nobody has spoken to yet."""
        return cls(State.STARTING, now, now)

    def takes_work(self, wanted: str | None) -> bool:
        """Whether new requests may go there; `wanted`: the version it must hold, None: any."""
        current = wanted is None or self.version == wanted
        return self.state is State.HEALTHY and current and not self.distrusted

    def can_be_updated(self) -> bool:
        """Whether it answers, so that weights can be sent to it."""
        return self.state in (State.HEALTHY, State.DRAINING)

    def after(self, event: Event, now: float, limits: Limits) -> Health:
        """The state after `event` at time `now`."""
        match event:
            case Answered(version):
                return self._answered(version, now)
            case RequestDone():
                return self._alive(now)
            case Missed(reason, refused):
                return self._missed(reason, refused, now, limits)
            case RequestFailed(reason, gone):
                return self._request_failed(reason, gone, now)
            case Restarted():
                return self._enter(
                    State.RESTARTING, now, last_alive=now, version=None, reason="restarted", distrusted=False
                )
            case DrainBegan():
                return self._enter(State.DRAINING, now) if self.state is State.HEALTHY else self
            case UpdateBegan():
                return self._enter(State.UPDATING, now, version=None) if self.can_be_updated() else self
            case UpdateDone(version):
                if self.state is not State.UPDATING:
                    return self  # it died meanwhile
                return self._enter(State.HEALTHY, now, last_alive=now, version=version, distrusted=False)
            case UpdateFailed(reason):
                if self.state is not State.UPDATING:
                    return self
                return self._enter(State.SUSPECT, now, version=None, reason=reason, distrusted=True)

    def _answered(self, version: str, now: float) -> Health:
        if self.state in (State.UPDATING, State.DRAINING):
            return self._replace(last_alive=now, refusals=0)
        if self.state is State.HEALTHY:
            return self._replace(last_alive=now, refusals=0, version=version)
        return self._enter(State.HEALTHY, now, last_alive=now, version=version)

    def _alive(self, now: float) -> Health:
        # A request that was sent before a failure says little about now: only a probe makes a suspect healthy.
        return self._replace(last_alive=now, refusals=0)

    def _missed(self, reason: str, refused: bool, now: float, limits: Limits) -> Health:
        refusals = self.refusals + 1 if refused else 0
        after = self._replace(refusals=refusals)
        if self.state is State.DEAD:
            return after
        silent = now - self.last_alive
        if self.state in (State.STARTING, State.RESTARTING):
            if now - self.since > limits.start:
                return after._die(f"did not answer within {limits.start:g} s of its start ({reason})", now)
            return after._replace(reason=reason)
        if refusals >= _REFUSALS:
            return after._die(f"nobody listens any more ({reason})", now)
        allowed = limits.update if self.state is State.UPDATING else limits.silence
        if silent > allowed:
            return after._die(f"silent for {silent:.0f} s ({reason})", now)
        if self.state is State.HEALTHY:
            return after._enter(State.SUSPECT, now, reason=reason, refusals=refusals)
        return after

    def _request_failed(self, reason: str, gone: bool, now: float) -> Health:
        if self.state is State.HEALTHY:
            return self._enter(State.SUSPECT, now, reason=reason)
        return self

    def _die(self, reason: str, now: float) -> Health:
        return self._enter(State.DEAD, now, version=None, reason=reason, deaths=self.deaths + 1)

    def _enter(self, state: State, now: float, **changes: object) -> Health:
        return self._replace(state=state, since=now, **({"reason": "", "refusals": 0} | changes))

    def _replace(self, **changes: object) -> Health:
        values = {name: getattr(self, name) for name in self.__slots__} | changes
        return Health(**values)  # type: ignore[arg-type]

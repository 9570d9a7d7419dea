"""Numbers that a launcher or a shell puts into the environment: where a process stands in the run, and its threads.

An empty variable is one that is not set: scripts write `WORLD_SIZE=$N` with an N that nobody gave.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from megatron_laser.errors import ConfigError

T = TypeVar("T")

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Place:
    """Where torchrun, or what sets its variables, has put this process.

    rank: None without a launcher: the only process of its run. local_*: on this node.
    """

    rank: int | None
    world_size: int
    local_rank: int
    local_world_size: int


def environment_int(
    name: str, default: T, *, least: int = 0, environment: Mapping[str, str] | None = None
) -> int | T:
    """The variable `name` as an integer; `default` where it is not set or empty.

    Raises:
        ConfigError: it holds something else, or less than `least`.
    """
    text = (os.environ if environment is None else environment).get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigError(
            [
                f"environment variable {name}={text}: expected an integer of {least} or more; correct or unset it"
            ]
        )
    return value


def read_place(environment: Mapping[str, str] | None = None) -> Place:
    """What the launcher's variables say.

    Raises:
        ConfigError: one is no number.
    """
    names = os.environ if environment is None else environment
    rank = environment_int("RANK", None, environment=names)
    world_size = environment_int("WORLD_SIZE", 1, least=1, environment=names)
    local_rank = environment_int("LOCAL_RANK", 0, environment=names)
    environment_int("MASTER_PORT", None, least=1, environment=names)
    local_world_size = environment_int("LOCAL_WORLD_SIZE", world_size, least=1, environment=names)
    return Place(rank, world_size, local_rank, local_world_size)


def place_in_run() -> Place:
    """`read_place` of this process, which is about to join its run.

    Raises:
        ConfigError: a variable is no number, or they contradict each other.
    """
    place = read_place()
    if place.rank is None and place.world_size > 1:
        raise ConfigError(
            [
                f"environment variable WORLD_SIZE={place.world_size} without RANK: start with torchrun, or unset "
                "WORLD_SIZE"
            ]
        )
    if place.rank is not None and place.rank >= place.world_size:
        raise ConfigError(
            [
                f"environment variables RANK={place.rank} and WORLD_SIZE={place.world_size}: expected a rank below the "
                "world size"
            ]
        )
    return place


def is_main_process() -> bool:
    """Whether this process of a run of one or several is the one that prints; asked where nothing may be raised.

    In an environment that is broken everybody is: there may be no rank 0.
    """
    try:
        place = place_in_run()
        openmp_threads()
    except ConfigError:
        return True
    return not place.rank


def drop_empty_numbers() -> None:
    """Unset what is set to nothing, before torch and its libraries read it: they take "" for a number and fail."""
    for name in (*_PLACE, _THREADS):
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]


def openmp_threads(environment: Mapping[str, str] | None = None) -> int | None:
    """OMP_NUM_THREADS for the outermost level: the first of OpenMP's list, one number for each level of nesting.

    Raises:
        ConfigError: it is no number.
    """
    names = os.environ if environment is None else environment
    first, *inner = names.get(_THREADS, "").split(",")
    for part in (first, *inner):
        if not part.strip() and inner:
            raise ConfigError(
                [f"environment variable {_THREADS}={names[_THREADS]}: expected numbers such as 2 or 2,1"]
            )
        environment_int(_THREADS, None, least=1, environment={_THREADS: part})
    return environment_int(_THREADS, None, least=1, environment={_THREADS: first})

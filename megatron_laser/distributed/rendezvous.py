"""Where ranks meet: torchrun's store, with the keys of each start of the ranks kept apart.

With `--max-restarts` torchrun starts all ranks again after one has died, and keeps its store, in which the addresses
of dead processes and the phases of their run would be taken for the new ones'. The restart count that it gives to
ranks cannot tell the starts apart: only the node on which a rank died counts. So the ranks agree on a name.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from megatron_laser.config.process_environment import place_in_run
from megatron_laser.errors import UserError

_POLL = 0.01  # seconds


class RendezvousError(UserError, RuntimeError):
    """The processes of a run did not meet: not all were started, or their address cannot be reached."""


def rendezvous(grace: float) -> tuple[dist.Store, int, int]:
    """Meet the other ranks of `env://`, or be alone without torchrun.

    Args:
        grace: seconds that the ranks have to come; the store's time-out afterwards, too.

    Returns:
        (store, rank, world size); the store has no keys yet but those of this start.

    Raises:
        RendezvousError: they do not come in time.
    """
    place = place_in_run()
    if place.rank is None:
        return dist.HashStore(), 0, 1
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=grace)))
        life = agree_on_life(store, rank, world_size, grace)
    except Exception as error:
        raise RendezvousError(
            f"rank {place.rank}: no rendezvous at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within run.start_grace {grace:g} s: {error}"
        ) from error
    return dist.PrefixStore(life, store), rank, world_size


def agree_on_life(store: dist.Store, rank: int, world_size: int, grace: float) -> str:
    """A name for this start of the ranks, the same on all of them and no earlier one's.

    Every rank leaves a random name of its own; rank 0 answers to each by its name, which no dead process can have,
    until all have heard. What it finds of a dead one is answered in vain and replaced when its successor comes.

    Raises:
        RuntimeError: a rank did not come within `grace` seconds.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"came/{rank}", own)
        life = store.get(f"life_of/{own}").decode()  # waits as long as the store's time-out
        store.set(f"heard/{life}/{rank}", b"1")
        return life
    answered: dict[int, bytes] = {}
    missing = set(range(1, world_size))
    until = time.monotonic() + grace
    while missing:
        for other in sorted(missing):
            if not store.check([f"came/{other}"]):
                continue
            name = store.get(f"came/{other}")
            if answered.get(other) != name:
                store.set(f"life_of/{name.decode()}", own)
                answered[other] = name
            if store.check([f"heard/{own}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"ranks {sorted(missing)} did not come")
        time.sleep(_POLL)
    return own

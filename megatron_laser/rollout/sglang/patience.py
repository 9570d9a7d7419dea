"""What is said while servers do not answer yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from megatron_laser.rollout.sglang.identify import refuse_strangers
from megatron_laser.rollout.sglang.member import Member

logger = logging.getLogger(__name__)

_SAY_EVERY = 30.0  # seconds between two words


class SayingThatItWaits:
    """A check for `Fleet.wait_until_up`: raises for strangers, and says at once and now and again what is awaited.

    A port at which nobody listens may be a mistake, or a server that starts: only the user knows.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._what = f"waiting up to {seconds:g} s for {count} server{'s' if count != 1 else ''}"
        self._next = 0.0

    def __call__(self, members: Sequence[Member]) -> None:
        refuse_strangers(members)
        now = time.monotonic()
        troubles = [str(member.trouble) for member in members if member.trouble is not None]
        if troubles and now >= self._next:
            self._next = now + _SAY_EVERY
            logger.warning("%s: %s", self._what, "; ".join(troubles))

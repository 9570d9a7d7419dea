"""Which prompts come next: epochs over all of them, shuffled or not, resumable at any prompt."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_laser.errors import DataError


class Cursor(Protocol):
    """Hands out prompts; what a collector needs of one."""

    @property
    def progress(self) -> float:
        """Epochs walked."""
        ...

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` prompts as (position, epoch)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        ...


class PromptCursor:
    """An endless walk over positions 0 .. num_prompts - 1 in which every epoch has each of them once.

    The order of an epoch depends on (seed, epoch) and `num_prompts` alone.
    """

    def __init__(
        self,
        num_prompts: int,
        seed: int,
        shuffle: bool,
        *,
        data_fingerprint: str = "",
        stream: int | None = None,
    ) -> None:
        """Start before the first prompt of epoch 0.

        Args:
            num_prompts: how many prompts there are, after dropping.
            seed: not negative.
            shuffle: whether epochs are shuffled, each differently.
            data_fingerprint: see `readers.fingerprint`; stored with the state and compared on loading.
            stream: of several cursors with one seed each has its own number, and so orders of its own.

        Raises:
            DataError: there are no prompts, or the seed is negative.
        """
        if num_prompts < 1:
            raise DataError(f"a cursor needs at least one prompt, not {num_prompts}")
        if seed < 0:
            raise DataError(f"run.seed: expected 0 or more, found {seed}")
        self._identity: dict[str, Any] = {
            "num_prompts": num_prompts,
            "seed": seed,
            "shuffle": shuffle,
            "data_fingerprint": data_fingerprint,
        }
        self._stream = () if stream is None else (stream,)
        self._epoch = 0
        self._offset = 0  # prompts of this epoch that were handed out; less than num_prompts
        self._order = self._epoch_order(0)

    @property
    def epoch(self) -> int:
        """The epoch of the next prompt, from 0."""
        return self._epoch

    @property
    def progress(self) -> float:
        """Epochs walked, with the part of the current one."""
        return self._epoch + self._offset / len(self._order)

    @property
    def num_prompts(self) -> int:
        """Prompts of an epoch."""
        return len(self._order)

    @property
    def taken(self) -> int:
        """Prompts handed out, over all epochs."""
        return self._epoch * len(self._order) + self._offset

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` prompts as (position, epoch); goes on into later epochs as needed."""
        if count < 0:
            raise ValueError(f"cannot take {count} prompts")
        taken: list[tuple[int, int]] = []
        while len(taken) < count:
            stop = min(self._offset + count - len(taken), len(self._order))
            taken += [(int(position), self._epoch) for position in self._order[self._offset : stop]]
            self._offset = stop
            if stop == len(self._order):
                self._epoch += 1
                self._offset = 0
                self._order = self._epoch_order(self._epoch)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands and over which data; plain JSON values."""
        return {**self._identity, "epoch": self._epoch, "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; the next `take` gives what it would have given there.

        Raises:
            DataError: the state lacks an entry or belongs to other data, another seed or order; the message
                names both values. The cursor is unchanged then.
        """
        epoch, offset = self.check_state(state)
        self._epoch, self._offset = epoch, offset
        self._order = self._epoch_order(epoch)

    def check_state(self, state: dict[str, Any]) -> tuple[int, int]:
        """(epoch, offset) of a state that can be loaded; raises as `load_state_dict` does."""
        if "sources" in state:
            raise DataError(
                "the saved data cursor is over several sources of data.train, which names one now: resume with the "
                "same data.train, or start a new run"
            )
        missing = sorted({*self._identity, "epoch", "offset"} - state.keys())
        if missing:
            raise DataError(f"the saved data cursor lacks {', '.join(missing)}: it is not a cursor's state")
        differing = [
            f"{name}: saved {state[name]!r}, now {value!r}"
            for name, value in self._identity.items()
            if state[name] != value
        ]
        if differing:
            raise DataError(
                "the saved data cursor belongs to another run over the data ("
                + "; ".join(differing)
                + "): resume with the same data files, data settings and run.seed, or start a new run"
            )
        epoch, offset = state["epoch"], state["offset"]
        if epoch < 0 or not 0 <= offset < len(self._order):
            raise DataError(
                f"the saved data cursor is at prompt {offset} of epoch {epoch}; "
                f"expected a prompt from 0 to {len(self._order) - 1}"
            )
        return epoch, offset

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """The positions in the epoch's order, [num_prompts] int64."""
        num_prompts = self._identity["num_prompts"]
        if not self._identity["shuffle"]:
            return np.arange(num_prompts, dtype=np.int64)
        bits = np.random.Philox(np.random.SeedSequence((self._identity["seed"], epoch, *self._stream)))
        # sorting raw bits, not Generator.permutation: numpy keeps only the bit streams the same over versions
        return np.argsort(bits.random_raw(num_prompts), kind="stable").astype(np.int64)

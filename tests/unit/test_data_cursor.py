"""The prompt cursor: epochs without repetition, and exact resumption."""

from __future__ import annotations

import json

import pytest

from megatron_laser.data import DataError, PromptCursor


def test_every_epoch_has_every_prompt_once() -> None:
    taken = PromptCursor(7, seed=1, shuffle=True).take(21)
    for epoch in range(3):
        positions = [position for position, of_epoch in taken if of_epoch == epoch]
        assert sorted(positions) == list(range(7))
    assert [epoch for _, epoch in taken] == [0] * 7 + [1] * 7 + [2] * 7


def test_the_pieces_taken_do_not_matter() -> None:
    whole = PromptCursor(10, seed=5, shuffle=True).take(47)
    cursor = PromptCursor(10, seed=5, shuffle=True)
    assert [item for count in (3, 0, 7, 12, 1, 24) for item in cursor.take(count)] == whole


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        taken = PromptCursor(50, seed=seed, shuffle=True).take(50 * (epoch + 1))
        return [position for position, _ in taken[-50:]]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9
    # pinned: an order that changes with a library's version would break resuming
    assert PromptCursor(8, seed=1, shuffle=True).take(8) == [(p, 0) for p in [2, 0, 1, 4, 5, 6, 7, 3]]


def test_without_shuffling_the_order_is_the_files() -> None:
    assert PromptCursor(3, seed=1, shuffle=False).take(5) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("before", [0, 1, 6, 7, 8, 20])
def test_resuming_gives_what_would_have_come(before: int) -> None:
    cursor = PromptCursor(7, seed=3, shuffle=True, data_fingerprint="sha256:a")
    cursor.take(before)
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = PromptCursor(7, seed=3, shuffle=True, data_fingerprint="sha256:a")
    resumed.take(4)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.progress) == (cursor.epoch, cursor.progress) == (before // 7, before / 7)
    assert resumed.take(30) == cursor.take(30)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data_fingerprint": "sha256:b"}, "saved 'sha256:a', now 'sha256:b'"),
        ({"num_prompts": 8}, "num_prompts: saved 7, now 8"),
        ({"seed": 4}, "seed: saved 3, now 4"),
        ({"shuffle": False}, "shuffle: saved True, now False"),
    ],
)
def test_a_state_of_other_data_is_refused_and_names_both(changes: dict[str, object], named: str) -> None:
    settings = {"num_prompts": 7, "seed": 3, "shuffle": True, "data_fingerprint": "sha256:a"}
    state = PromptCursor(**settings).state_dict()  # type: ignore[arg-type]
    cursor = PromptCursor(**{**settings, **changes})  # type: ignore[arg-type]
    cursor.take(2)
    with pytest.raises(DataError, match=named):
        cursor.load_state_dict(state)
    assert cursor.state_dict()["offset"] == 2


def test_a_broken_state_is_refused() -> None:
    cursor = PromptCursor(7, seed=3, shuffle=True)
    with pytest.raises(DataError, match="lacks epoch, offset"):
        cursor.load_state_dict({k: v for k, v in cursor.state_dict().items() if k not in ("epoch", "offset")})
    for broken in ({"offset": 7}, {"offset": -1}, {"epoch": -1}):
        with pytest.raises(DataError, match="expected a prompt from 0 to 6"):
            cursor.load_state_dict({**cursor.state_dict(), **broken})


def test_impossible_cursors_are_refused() -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        PromptCursor(0, seed=1, shuffle=True)
    with pytest.raises(DataError, match=r"run\.seed"):
        PromptCursor(1, seed=-1, shuffle=True)
    with pytest.raises(ValueError, match="cannot take -1"):
        PromptCursor(1, seed=1, shuffle=True).take(-1)

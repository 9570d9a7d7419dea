"""events.jsonl and timeline.jsonl: what is written, cut at a resume, and never in a run's way."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_laser.distributed.runtime import Runtime
from megatron_laser.observability import events
from megatron_laser.observability.events import EventLog, note
from megatron_laser.observability.timeline import Span, TimelineFile, joined
from megatron_laser.observability.timers import Timers
from megatron_laser.rollout.client.fleet import Fleet
from megatron_laser.rollout.client.health import Answered, Limits, Missed, UpdateBegan, UpdateDone
from megatron_laser.rollout.client.responses import RequestStats
from megatron_laser.rollout.client.sender import RequestSender
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.trainer.timeline import Timeline


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class FullDisk(FileIO):
    """A file that takes five bytes."""

    def __init__(self, path: Path, mode: str, buffering: int) -> None:
        super().__init__(path, mode)

    def write(self, line: Any) -> int:
        return super().write(line[:5])


def test_whoever_notices_something_writes_into_the_log_that_is_open(tmp_path: Path) -> None:
    note("server", "nobody hears this")
    log = EventLog(tmp_path, last_step=-1, clock=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    log.step = 3
    note("server", "a is lost:\n  no answer")
    note("checkpoint", "saved step 2", 2)
    log.close()
    note("server", "nor this")
    assert lines(tmp_path / "events.jsonl") == [
        {"time": "2026-01-02T03:04:05+00:00", "step": 3, "kind": "server", "text": "a is lost: no answer"},
        {"time": "2026-01-02T03:04:05+00:00", "step": 2, "kind": "checkpoint", "text": "saved step 2"},
    ]


def test_a_resumed_run_cuts_what_it_does_again_and_half_lines(tmp_path: Path) -> None:
    for name in ("events.jsonl", "timeline.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    EventLog(tmp_path, last_step=2).close()
    TimelineFile(tmp_path, last_step=1)
    assert lines(tmp_path / "events.jsonl") == [{"step": 1}, {"step": 2}]
    assert lines(tmp_path / "timeline.jsonl") == [{"step": 1}]


def test_a_line_that_lacks_its_end_alone_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log = EventLog(tmp_path, last_step=2)
    log.add("resume", "goes on")
    log.close()
    assert [line["step"] for line in lines(tmp_path / "events.jsonl")] == [1, 2, 2]


def test_a_line_of_which_a_full_disk_took_a_part_is_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path, last_step=-1)
    monkeypatch.setattr(Path, "open", lambda path, *how, **more: FullDisk(path, "ab", buffering=0))
    log.add("stop", "a")
    monkeypatch.undo()
    log.add("stop", "b")
    log.close()
    assert (tmp_path / "events.jsonl").stat().st_size == 5 and "events.jsonl failed" in caplog.text


def test_a_resumed_run_without_a_timeline_keeps_none_of_the_steps_that_it_does_again(tmp_path: Path) -> None:
    (tmp_path / "timeline.jsonl").write_text('{"step": 1, "spans": []}\n{"step": 2, "spans": []}\n')
    runtime = SimpleNamespace(is_main=True, world_size=1)
    timeline = Timeline(cast(Runtime, runtime), Timers(), tmp_path, every=0, last_step=1)
    timeline.add(2)
    assert [line["step"] for line in lines(tmp_path / "timeline.jsonl")] == [1]


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path / "gone", last_step=-1)
    with caplog.at_level(logging.WARNING):
        log.add("stop", "a")
        log.add("stop", "b")
    log.close()
    assert len(caplog.records) == 1 and "events.jsonl failed" in caplog.text
    assert events._open is None


def test_spans_begin_where_the_phase_did_whatever_was_collected_meanwhile() -> None:
    now = 100.0
    timers = Timers(lambda: now)
    with timers("total"):
        now += 1
        with timers("generate"):
            now += 2
            timers.collect()
            with timers("generate"):
                now += 1
        now += 1
    assert timers.take_spans("total") == (100.0, [Span("generate", 1.0, 4.0), Span("total", 0.0, 5.0)])
    assert timers.take_spans("total") == (0.0, [])
    assert timers.collect() == {"time/generate": 1.0, "time/total": 2.0}


def test_phases_that_come_and_go_are_joined_over_the_smallest_gaps() -> None:
    spans = [Span("grade", start, start + 0.5) for start in (0.0, 0.6, 5.0, 5.6, 9.0)] + [Span("train", 1, 2)]
    assert joined(spans, most=3) == [
        Span("grade", 0.0, 1.1),
        Span("train", 1, 2),
        Span("grade", 5.0, 6.1),
        Span("grade", 9.0, 9.5),
    ]
    assert joined(spans, most=99) == sorted(spans, key=lambda span: span.start)
    assert joined([]) == []


def test_a_line_of_the_timeline_has_all_ranks(tmp_path: Path) -> None:
    TimelineFile(tmp_path, last_step=0).add(
        4, {"rank 0": [Span("train", 0.12345, 2)], "rank 1": [Span("sync", 2, 3)]}
    )
    assert lines(tmp_path / "timeline.jsonl") == [
        {
            "step": 4,
            "spans": [
                {"who": "rank 0", "phase": "train", "start": 0.1235, "end": 2},
                {"who": "rank 1", "phase": "sync", "start": 2, "end": 3},
            ],
        }
    ]


def test_a_server_that_is_lost_and_its_return_are_events_and_weight_updates_are_none(tmp_path: Path) -> None:
    fleet = Fleet(lambda: [ServerEndpoint("http://a")], None, limits=Limits(start=60, update=60, silence=30))  # type: ignore[arg-type]
    log = EventLog(tmp_path, last_step=0)
    (member,) = fleet.members
    fleet.handle(member, Answered("run-1"))
    for _ in range(2):
        fleet.handle(member, UpdateBegan())
        fleet.handle(member, UpdateDone("run-1"))
    assert not (tmp_path / "events.jsonl").exists()
    for _ in range(4):
        fleet.handle(member, Missed("connection refused", refused=True))
    for _ in range(3):
        fleet.handle(member, Answered("run-1"))
    log.close()
    texts = [str(event["text"]) for event in lines(tmp_path / "events.jsonl")]
    assert texts[0].startswith("http://a is lost") and "connection refused" in texts[0]
    assert texts[-1] == "http://a is back" and texts.count("http://a is back") == 1


def test_a_server_is_busy_from_its_first_open_request_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("megatron_laser.rollout.client.sender.time.perf_counter", lambda: now[0])
    ends: list[asyncio.Future[dict[str, object]]] = []

    class Client:
        async def request(self, body: object, *, deadline: float, phase: str) -> dict[str, object]:
            ends.append(asyncio.get_running_loop().create_future())
            return await ends[-1]

    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def main() -> RequestSender:
        fleet = SimpleNamespace(succeeded=lambda member: None)
        member = SimpleNamespace(client=Client(), running=set(), url="http://a")
        sender = RequestSender(fleet, RequestStats(), None)  # type: ignore[arg-type]
        asked = []
        for start in (1.0, 2.0):
            now[0] = start
            asked.append(asyncio.create_task(sender._send(member, {}, 9.0, "generation", False)))  # type: ignore[arg-type]
            await settle()
        for end, answer in ((4.0, 0), (7.0, 1)):
            now[0] = end
            ends[answer].set_result({})
            await settle()
        await asyncio.gather(*asked)
        return sender

    sender = asyncio.run(main())
    assert list(sender.busy) == [("http://a", 1.0, 7.0)]

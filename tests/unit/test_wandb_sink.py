"""The wandb sink, against a stand-in for the package."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_laser.observability.metrics_logger import MetricsLogger
from megatron_laser.observability.wandb_sink import WandbSink, open_wandb


class FakeRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.lines: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = 0
        self.broken = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, line: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.lines.append(line)

    def finish(self) -> None:
        self.finished += 1


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged_in = False
        self.runs: list[FakeRun] = []
        self.unreachable = False

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        return self.logged_in

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeRun:
        if self.unreachable and arguments["mode"] == "online":
            raise TimeoutError("no answer in 60 s")
        self.runs.append(FakeRun(arguments))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return module


def opened(folder: Path) -> WandbSink | None:
    return open_wandb(folder, project=None, name="a run", settings={"run": {"seed": 1}})


def test_the_numbers_of_each_line_are_sent_and_lists_and_nulls_are_not(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    with MetricsLogger(tmp_path, tensorboard=False, wandb=opened(tmp_path)) as metrics:
        metrics.log(3, {"loss": 0.5, "quantiles": [1.0, 2.0], "f1": float("nan")})
    (run,) = wandb.runs
    assert run.lines == [{"step": 3, "loss": 0.5}]
    assert run.finished == 1
    assert ("*", "step") in run.metrics
    assert run.arguments["project"] == "megatron_laser"
    assert run.arguments["config"] == {"run": {"seed": 1}}


def test_a_resumed_run_continues_its_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    opened(tmp_path)
    opened(tmp_path)
    opened(tmp_path / "other")
    one, two, other = (run.arguments["id"] for run in wandb.runs)
    assert one == two != other
    assert {run.arguments["resume"] for run in wandb.runs} == {"allow"}


def test_nothing_goes_online_without_a_key(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    opened(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    opened(tmp_path)
    assert [run.arguments["mode"] for run in wandb.runs] == ["offline", "online", "disabled"]


def test_a_stored_login_is_used(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.logged_in = True
    opened(tmp_path)
    assert wandb.runs[0].arguments["mode"] == "online"


def test_a_server_that_does_not_answer_means_offline(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    wandb.unreachable = True
    assert opened(tmp_path) is not None
    assert [run.arguments["mode"] for run in wandb.runs] == ["offline"]
    assert "no connection (no answer in 60 s)" in caplog.text


def test_a_failure_while_logging_is_told_once_and_metrics_go_on(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsLogger(tmp_path, tensorboard=False, wandb=opened(tmp_path)) as metrics:
        wandb.runs[0].broken = True
        metrics.log(1, {"loss": 1.0})
        metrics.log(2, {"loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert caplog.text.count("could not be logged") == 1


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path) is None
    assert "logging.wandb is true but wandb cannot be imported" in caplog.text
    assert "pip install 'megatron_laser[wandb]'" in caplog.text

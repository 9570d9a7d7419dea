"""Windows of the profiler: which steps, what is written, and that nothing else changes."""

import gzip
import json
import logging
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import after_recording, checkpoint_digests, run

from megatron_laser.config import ConfigError, RunConfig, check_layout, load_config, read_architecture
from megatron_laser.config.schema.trials import ProfileConfig
from megatron_laser.observability.timers import Timers
from megatron_laser.run import profiling
from megatron_laser.run.profiling import Windows
from megatron_laser.run.session import stack_signal


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(YAML file, output folder) of a run without windows."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"), run={"steps": 2}, checkpoint={"every": 2})
    return file, run(file, file.parent / "undisturbed")


def files(folder):
    return (
        sorted(path.name for path in (folder / "profile").iterdir()) if (folder / "profile").exists() else []
    )


def trace_of(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_window_writes_a_trace_with_the_phases_and_the_run_is_the_same_bitwise(
    undisturbed, tmp_path, caplog
):
    file, expected = undisturbed
    caplog.set_level(logging.INFO)
    out = run(file, tmp_path / "out", "logging.profile={steps: 2, memory: true}")
    assert files(out) == ["steps_2-2.rank_0.trace.json.gz"]
    assert f"profiling steps 2 to 2 on rank 0: {out}/profile/steps_2-2.*" in caplog.text
    events = trace_of(out / "profile" / "steps_2-2.rank_0.trace.json.gz")
    marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for phase in ("generate", "logprob", "train"):
        assert marks.count(phase) == 1, phase
    assert any(event["name"] == "[memory]" for event in events)
    assert metrics_without_times(out) == metrics_without_times(expected)
    assert checkpoint_digests(out, 2) == checkpoint_digests(expected, 2)


@pytest.mark.long
def test_sigusr2_starts_a_window_with_the_next_step(undisturbed, tmp_path, monkeypatch):
    file, expected = undisturbed
    after_recording(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    out = run(file, tmp_path / "out", "logging.profile.asked_steps=2")
    assert files(out) == ["steps_2-2.rank_0.trace.json.gz"]  # not beyond the run's last step
    assert metrics_without_times(out) == metrics_without_times(expected)


@pytest.mark.long
def test_a_run_that_stops_inside_a_window_writes_what_it_saw_and_goes_on_with_the_rest(undisturbed, tmp_path):
    file, expected = undisturbed
    with pytest.MonkeyPatch.context() as patch:
        after_recording(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        out = run(file, tmp_path / "out", "logging.profile.steps=[1, 2]")
    assert files(out) == ["steps_1-2.rank_0.trace.json.gz"]
    run(file, tmp_path / "out", "logging.profile.steps=[1, 2]")
    assert files(out) == ["steps_1-2.rank_0.trace.json.gz", "steps_2-2.rank_0.trace.json.gz"]
    assert metrics_without_times(out) == metrics_without_times(expected)


def test_a_trace_that_cannot_be_written_is_one_warning(undisturbed, tmp_path, caplog):
    file, expected = undisturbed
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "profile").write_text("a file")
    out = run(file, tmp_path / "out", "logging.profile.steps=[1, 2]")
    assert [r.message for r in caplog.records if "logging.profile failed" in r.message][1:] == []
    assert "logging.profile failed (FileExistsError" in caplog.text
    assert metrics_without_times(out) == metrics_without_times(expected)


def windows(tmp_path, *, rank=0, run_steps=10, asked=(), timers=None, **settings):
    requests = iter(asked)
    return Windows(
        ProfileConfig(**settings),
        tmp_path,
        timers or Timers(),
        rank=rank,
        steps=run_steps,
        asked=lambda: next(requests, 0),
    )


class _FakeProfiler:
    on = 0

    def __init__(self, **settings):
        self.settings = settings

    def start(self):
        _FakeProfiler.on += 1

    def stop(self):
        _FakeProfiler.on -= 1

    def export_chrome_trace(self, path):
        assert path.endswith(".json.gz")
        with open(path, "w") as file:
            file.write(repr(sorted(self.settings)))


@pytest.mark.parametrize(
    "settings, asked, expected",
    [
        ({}, [], []),
        ({"steps": [3, 4]}, [], ["3-4"]),
        ({"steps": 3}, [], ["3-3"]),
        ({"ranks": "all"}, [0, 2], ["2-3"]),
        ({"ranks": [1]}, [0, 2], []),
        ({}, [0] * 9 + [5], ["10-10"]),  # not beyond the run's last step
        (
            {"steps": [3, 5]},
            [0, 3],
            ["2-4", "5-5"],
        ),  # asked for before: the rest of the other comes behind it
    ],
)
def test_windows_of_a_run_of_ten_steps(tmp_path, monkeypatch, settings, asked, expected):
    monkeypatch.setattr(profiling, "profile", _FakeProfiler)
    some = windows(tmp_path, asked=asked, **settings)
    for step in range(1, 11):
        with some.step(step):
            pass
    some.close()
    assert _FakeProfiler.on == 0
    assert files(tmp_path) == [f"steps_{name}.rank_0.trace.json.gz" for name in expected]


def test_on_cuda_phases_are_nvtx_ranges_and_a_window_keeps_the_allocators_history(tmp_path, monkeypatch):
    ranges, history = [], []

    @contextmanager
    def nvtx(name):
        ranges.append(name)
        yield

    monkeypatch.setattr(profiling, "profile", _FakeProfiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: history.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "wb").close())
    timers = Timers()
    some = windows(tmp_path, rank=2, timers=timers, steps=[2, 2], ranks=[0, 2], memory=True)
    for step in (1, 2, 3):
        with some.step(step), timers("train"):
            pass
    assert ranges == ["start", *["train"] * 3]  # in and outside the window
    assert files(tmp_path) == ["steps_2-2.rank_2.memory.pickle", "steps_2-2.rank_2.trace.json.gz"]
    assert [how.get("enabled", "on") for how in history] == ["on", None]


def test_an_error_inside_a_window_leaves_no_profiler_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "profile", _FakeProfiler)
    some = windows(tmp_path, steps=[1, 2])
    with pytest.raises(RuntimeError, match="lost"), some.step(1):
        raise RuntimeError("lost")
    some.abandon()
    assert _FakeProfiler.on == 0 and files(tmp_path) == []


def build(**settings):
    required = {"model": {"path": "m"}, "data": {"train": "t"}, "run": {"steps": 5, "output_dir": "o"}}
    return RunConfig.model_validate({**required, "logging": {"profile": settings}})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": [3, 2]}, "two steps of 1 or more in their order"),
        ({"steps": [0, 2]}, "two steps of 1 or more in their order"),
        ({"steps": [1, 2, 3]}, "the first and the last step of the window"),
        ({"steps": "all"}, "the first and the last step of the window"),
        ({"ranks": []}, "all or a list of ranks"),
        ({"ranks": "some"}, "all or a list of ranks"),
        ({"ranks": [-1]}, "all or a list of ranks, 0 or more"),
    ],
)
def test_windows_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_window_lies_within_the_run_and_on_ranks_that_it_has(undisturbed):
    file, _ = undisturbed
    with pytest.raises(ConfigError, match=r"logging.profile.steps: \[2, 3\] ends after run.steps 2"):
        load_config(file, ["logging.profile.steps=[2, 3]"])
    config = load_config(file, ["logging.profile={steps: [1, 2], ranks: [0, 2, 3]}"])
    with pytest.raises(
        ConfigError, match="rank 2, 3 of 2 ranks, which are 0 to 1; name some of them, or all"
    ):
        check_layout(config, read_architecture(config.model.path), 2)
    check_layout(config, read_architecture(config.model.path), 4)


def test_sigquit_prints_the_stacks_of_all_threads_and_ends_nothing(capfd):
    with stack_signal():
        os.kill(os.getpid(), signal.SIGQUIT)
    written = capfd.readouterr().err
    assert "test_sigquit_prints_the_stacks" in written and "most recent call first" in written

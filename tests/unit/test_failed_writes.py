"""Writes that fail: what people look at is switched off, what a run has measured is kept, and closing is quiet."""

import json
import logging
import os
import resource
import subprocess
import sys
import threading

import pytest
from helpers.torchrun import worker_environment

from megatron_laser.model.hf_folder import write_hf_folder
from megatron_laser.observability import metrics_logger as sinks
from megatron_laser.observability.best_effort import BestEffort, SafeOutput
from megatron_laser.observability.live_view import LiveView
from megatron_laser.observability.metrics_logger import MetricsLogger, _quiet_writer_threads
from megatron_laser.weight_sync import sync_weights


@pytest.fixture
def room():
    """Limits the size of files, as a full disk would: what does not fit is not written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def test_a_line_that_does_not_fit_is_kept_whole_elsewhere_and_the_file_is_as_before(tmp_path, room):
    metrics = MetricsLogger(tmp_path, tensorboard=False)
    metrics.log(1, {"loss": 0.5})
    before = metrics.path.read_bytes()
    room(len(before) + 10)
    with pytest.raises(OSError, match="too large"):
        metrics.log(2, {"loss": 0.25})
    room(None)
    metrics.close()
    assert metrics.path.read_bytes() == before
    assert metrics.unwritten == ['{"step": 2, "loss": 0.25}\n']
    with MetricsLogger(tmp_path, tensorboard=False, last_step=2, unwritten=metrics.unwritten) as again:
        again.log(3, {"loss": 0.125})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_metrics_do_not_vanish_into_a_file_that_nobody_sees(tmp_path, replaced):
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        metrics.path.unlink()
        if replaced:
            metrics.path.write_text("")
        with pytest.raises(FileNotFoundError, match="was deleted or replaced"):
            metrics.log(1, {"loss": 0.5})
        assert len(metrics.unwritten) == 1


class BrokenWriter:
    def add_scalar(self, *arguments):
        raise OSError(28, "No space left on device")

    close = add_histogram = add_scalar


def test_a_tensorboard_that_fails_is_switched_off_and_the_metrics_go_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sinks, "_tensorboard_writer", lambda *_: BrokenWriter())
    with caplog.at_level(logging.WARNING), MetricsLogger(tmp_path) as metrics:
        for step in (1, 2):
            metrics.log(step, {"loss": 0.5})
            metrics.histograms(step, {"score/right": [0.5]})
    assert len(metrics.path.read_text().splitlines()) == 2
    assert len(caplog.records) == 1
    assert (
        "logging.tensorboard failed (OSError: [Errno 28] No space left on device); it is off" in caplog.text
    )


def test_a_tensorboard_that_cannot_be_opened_is_no_end_either(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with MetricsLogger(tmp_path) as metrics:
        metrics.log(1, {"loss": 0.5})
    assert "logging.tensorboard failed" in caplog.text


def test_an_extra_that_fails_is_told_once_but_another_kind_of_error_is_not_hidden(caplog):
    extra, calls = BestEffort("the dump"), []

    def full():
        calls.append(1)
        raise OSError(28, "No space left on device")

    for _ in range(3):
        extra(full)
    assert len(calls) == len(caplog.records) == 1
    with pytest.raises(ZeroDivisionError):
        BestEffort("the dump")(lambda: 1 / 0)


@pytest.fixture
def closed_pipe():
    """A text stream like standard output, whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    yield stream
    stream.close()


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_view_goes_on_in_silence_when_standard_output_is_closed(closed_pipe, monkeypatch, caplog, mode):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with LiveView(3, mode) as view:
        for step in (1, 2, 3):
            view.update(step, {"reward_mean": 0.5})
        view.message("done")
    assert "writing to standard output failed (BrokenPipeError" in caplog.text
    assert len(caplog.records) == 1


def test_a_stream_that_this_process_has_closed_is_no_end(tmp_path, caplog):
    with (tmp_path / "out").open("w") as stream:
        output = SafeOutput(stream)
    assert output.write("line\n") == 5
    output.flush()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("target", ["closed pipe", "/dev/full"])
def test_a_process_ends_well_although_nobody_reads_what_it_says(target):
    """Python flushes standard output once more at the end, and fails if that does."""
    script = (
        "from megatron_laser.observability.best_effort import print_line\nprint_line('one')\nprint('two')"
    )
    reading, writing = os.pipe()
    os.close(reading)
    if target != "closed pipe":
        os.close(writing)
        writing = os.open(target, os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=worker_environment(),
        text=True,
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "writing to standard output failed" in done.stderr


def test_a_process_without_standard_streams_gets_empty_ones(tmp_path):
    script = (
        "import sys; from megatron_laser.observability.best_effort import open_standard_streams, print_line\n"
        "open_standard_streams(); file = open(sys.argv[1], 'w'); print_line('one'); print('two', file=sys.stderr)\n"
        "import subprocess; child = subprocess.run(['sh', '-c', 'echo one; echo two >&2'])\n"
        "file.write(str(file.fileno() > 2 and child.returncode == 0))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], env=worker_environment(), check=True)
    assert (tmp_path / "out").read_text() == "True"


def test_a_full_disk_under_tensorboard_is_no_traceback(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    _quiet_writer_threads.__wrapped__()

    class Writer(threading.Thread):
        __module__ = "tensorboard.summary"

    for kind in (Writer, threading.Thread):
        thread = kind(target=lambda: [][1])
        thread.start()
        thread.join()
    assert [arguments.thread for arguments in told] == [thread]


def weights():
    import torch

    return ((f"layer.{index}", torch.zeros(4096)) for index in range(4))


def test_an_export_that_does_not_fit_leaves_nothing_behind_and_says_why(tmp_path, room):
    import torch

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    room(4096)
    with pytest.raises(OSError, match="File too large"):
        write_hf_folder(weights(), tmp_path / "hf", source=tmp_path / "source", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_cannot_be_written_for_servers_are_another_attempts_and_no_rank_is_left_in_the_stream():
    class Engine:
        version = 1

        def update_weights(self, stream, version):
            next(stream)
            raise OSError(28, "No space left on device")

    stream = weights()
    assert "No space left" in sync_weights(stream, Engine(), version=2)
    assert next(stream, None) is None

"""What a run prints of its alarms: a line when one is raised, one when it is over, nothing twice after a restart."""

import numpy as np
import pytest

from megatron_laser.config import RunConfig
from megatron_laser.observability.alarms import AlarmWatch, alarms_of
from megatron_laser.observability.metrics_logger import read_metrics
from megatron_laser.run.recorder import RunRecorder
from megatron_laser.types import RolloutBatch


class Folder:
    """A claimed output folder that nobody takes away."""

    owner = None
    told = changes = ()

    def intact(self):
        return True


def config(folder, **alarms):
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t.jsonl"},
            "run": {"steps": 100, "output_dir": str(folder)},
            "logging": {"live": "off", "tensorboard": False},
            "alarms": alarms,
        }
    )


def record(config, first, last, *, resumed_from=None, share=0.9):
    """Steps `first` to `last` with this share of truncated responses, as the trainer's numbers are."""
    resumed = None if resumed_from is None else {"step": resumed_from, "run": {}}
    recorder = RunRecorder(config, Folder(), resumed)
    for step in range(first, last + 1):
        assert recorder.write(step, {"truncated_fraction": np.float64(share), "outcome/correct": 5}) == ""
    recorder.close()


def alarm_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm")]


def test_an_alarm_is_one_line_when_it_is_raised_and_one_when_it_is_over_also_over_a_restart(tmp_path, capsys):
    settings = config(tmp_path)
    record(settings, 1, 30)
    (line,) = alarm_lines(capsys)
    assert line.startswith("alarm at step 14: many responses are cut: ") and "since step 1. " in line
    # Killed after step 30, with a checkpoint of step 20: the line was printed and is not printed again.
    record(settings, 21, 40, resumed_from=20)
    assert alarm_lines(capsys) == []
    record(settings, 41, 70, resumed_from=40, share=0.1)
    (line,) = alarm_lines(capsys)
    assert line == "alarm over: many responses are cut (truncated), raised at step 14, last seen at step 40"
    (alarm,) = alarms_of(read_metrics(tmp_path / "metrics.jsonl"), settings.alarms)
    assert (alarm.step, alarm.last_step) == (14, 40)


def test_a_resumed_run_that_was_killed_before_its_alarm_raises_it_at_the_same_step(tmp_path, capsys):
    settings = config(tmp_path)
    record(settings, 1, 8)
    record(settings, 7, 30, resumed_from=6)
    (line,) = alarm_lines(capsys)
    assert line.startswith("alarm at step 14: ") and "since step 1. " in line


def test_a_fresh_start_in_the_same_folder_forgets_what_an_earlier_attempt_had(tmp_path, capsys):
    settings = config(tmp_path)
    record(settings, 1, 13)
    record(settings, 1, 13)
    assert alarm_lines(capsys) == []


def test_alarms_that_are_off_print_nothing(tmp_path, capsys):
    record(config(tmp_path / "all", enabled=False), 1, 30)
    record(config(tmp_path / "one", truncated=0), 1, 30)
    assert alarm_lines(capsys) == []


@pytest.mark.parametrize("method", ["add", "active"])
def test_a_fault_in_the_judging_of_metrics_ends_no_run(tmp_path, monkeypatch, caplog, method):
    def broken(*arguments):
        raise RuntimeError("a fault")

    monkeypatch.setattr(AlarmWatch, method, broken if method == "add" else property(broken))
    record(config(tmp_path), 1, 30)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 30
    assert caplog.text.count("alarms failed (RuntimeError: a fault); it is off from now on") == 1


def test_a_fault_in_a_dump_ends_no_run(tmp_path, caplog):
    def broken():
        raise AttributeError("no tokenizer")

    settings = config(tmp_path)
    settings = settings.model_copy(
        update={"logging": settings.logging.model_copy(update={"rollouts_every": 1, "rollouts_tokens": True})}
    )
    recorder = RunRecorder(settings, Folder(), None)
    for step in (1, 2):
        recorder.dump(RolloutBatch(step, 0, []), [], [], broken)
    recorder.close()
    assert caplog.text.count("logging.rollouts_every failed (AttributeError: no tokenizer)") == 1

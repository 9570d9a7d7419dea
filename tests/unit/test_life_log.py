"""What is logged while a run goes on is an event of the run, and a line with its step."""

import ast
import json
import logging

import pytest
from helpers.source_tree import modules, tree

from megatron_laser.observability.events import EventLog, say
from megatron_laser.run.life_log import KINDS, LifeLog, kind_of

LOG = "megatron_laser.ops.memory"


@pytest.fixture
def events(tmp_path):
    log = EventLog(tmp_path, last_step=4)
    log.step = 5
    yield log
    log.close()


def written(folder):
    return [json.loads(text) for text in (folder / "events.jsonl").read_text().splitlines()]


def test_a_warning_is_an_event_and_the_logs_own_line_gets_the_step(events, tmp_path, caplog):
    with LifeLog(events, None):
        logging.getLogger(LOG).warning("out of memory on %s:\n less is kept", "cuda:0")
        logging.getLogger("megatron_laser.trainer.bad_steps").error("step 5: an update was skipped")
        logging.getLogger(LOG).info("nothing to tell")
    logging.getLogger(LOG).warning("after the run")
    assert [(one["step"], one["kind"], one["text"]) for one in written(tmp_path)] == [
        (5, "fallback", "out of memory on cuda:0: less is kept"),
        (5, "skipped", "an update was skipped"),
    ]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "step 5: out of memory on cuda:0: less is kept",
        "step 5: an update was skipped",
        "after the run",
    ]


def test_with_a_live_view_the_line_goes_above_it_and_not_through_it(events, monkeypatch):
    shown, stream = [], []

    class Terminal:
        def write(self, text):
            stream.append(text)

        def flush(self):
            pass

        def isatty(self):
            return True

    root = logging.getLogger()
    screen = logging.StreamHandler(Terminal())
    root.addHandler(screen)
    try:
        with LifeLog(events, shown.append):
            logging.getLogger(LOG).warning("less is kept")
            logging.getLogger("megatron_laser.rollout.client.fleet").error("no server")
        logging.getLogger(LOG).warning("after the run")
    finally:
        root.removeHandler(screen)
    assert shown == ["step 5: fallback: less is kept", "step 5: error: no server"]
    assert "".join(stream).split("\n")[0] == "after the run"


def test_a_fault_in_the_telling_does_not_reach_who_logs(events, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def broken(text):
        raise RuntimeError("the screen is gone")

    with LifeLog(events, broken):
        logging.getLogger(LOG).warning("less is kept")


def test_what_is_said_is_written_and_shown_from_wherever_it_is_said(events, tmp_path):
    shown = []
    events.show = shown.append
    assert say("server", "a is\n lost") and say("checkpoint", "saved b", 4)
    assert shown == ["step 5: a is lost", "step 4: saved b"]
    assert [one["kind"] for one in written(tmp_path)] == ["server", "checkpoint"]
    events.close()
    assert not say("server", "nobody hears this")


@pytest.mark.parametrize(
    ("logger", "kind"),
    [
        ("megatron_laser.rollout.client.router", "fallback"),
        ("megatron_laser.rollout.client.fleet", "server"),
        ("megatron_laser.weight_sync.update", "server"),
        ("megatron_laser.weight_sync.checksums", "fallback"),
        ("megatron_laser.rewards.workers.grading_pool", "reward"),
        ("megatron_laser.trainer.checkpoint.manager", "checkpoint"),
        ("megatron_laser.trainer.stragglers", "warning"),
    ],
)
def test_the_kind_follows_from_who_logs(logger, kind):
    assert kind_of(logger) == kind


def test_every_module_that_the_kinds_name_is_there_and_logs():
    """A module that was renamed would be told as a mere warning."""
    for name in KINDS:
        found = [module for module in modules() if f"{module}.".startswith(f"megatron_laser.{name}.")]
        logs = [module for module in found if _logs(module)]
        assert logs, f"KINDS names {name}, where nothing is logged as a warning or an error"


def _logs(module):
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("warning", "error")
        and getattr(node.func.value, "id", "") == "logger"
        for node in ast.walk(tree(modules()[module]))
    )

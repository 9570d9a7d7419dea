"""Requests to stop: raised where that is allowed, noted elsewhere, and the first reason counts."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_laser.run.stop_signals import ASKING, StopNow, answering_signals

pytestmark = pytest.mark.usefixtures("heard_signals")


def kill(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_before_the_run_is_set_up_ends_the_block_at_once_and_handlers_come_back(number, capsys):
    before = [signal.getsignal(each) for each in ASKING]
    with answering_signals() as signals:
        signals.describe = lambda: "leaving"
        kill(number)
        time.sleep(30)
        pytest.fail("it went on")
    assert signals.stopped and signals.reason == number.name
    assert [signal.getsignal(each) for each in ASKING] == before
    out = capsys.readouterr().out
    assert (
        f"stopped ({number.name}): nothing was trained since the start; the same command starts it again"
        in out
    )


def test_once_there_is_something_to_save_a_signal_is_noted_and_told_until_a_block_lets_it_raise(capsys):
    heard = []
    with answering_signals() as signals:
        signals.started_up()
        signals.describe = lambda: "stopping after step 7"
        signals.on_request(heard.append)
        kill(signal.SIGTERM)
        kill(signal.SIGUSR1)
        assert (signals.reason, heard, signals.stopped) == ("SIGTERM", ["SIGTERM"], False)
        with signals.interruptible(after=5.0):
            pass
        with pytest.raises(StopNow), signals.interruptible():
            pytest.fail("the request was there before")
        with pytest.raises(StopNow), signals.interruptible(after=0.3):
            time.sleep(30)
        signals.on_request(heard.append)
    assert heard == ["SIGTERM"] * 2
    assert (
        "SIGTERM: stopping after step 7; a second Ctrl-C or SIGTERM ends at once\n" in capsys.readouterr().out
    )


def test_another_rank_s_request_and_a_limit_raise_as_a_signal_does():
    with answering_signals() as signals:
        signals.set_limit(time.monotonic() + 0.2, "run.time_limit 3 s")
        time.sleep(30)
        pytest.fail("it went on")
    assert signals.stopped and signals.reason == "run.time_limit 3 s"


def test_errors_that_have_nothing_to_do_with_a_stop_pass_through():
    with pytest.raises(KeyError), answering_signals() as signals:
        raise KeyError("x")
    assert not signals.stopped


def test_what_is_inside_another_block_is_that_one_s():
    with answering_signals() as outer:
        with answering_signals() as inner:
            assert inner is outer
        outer.started_up()


HANGS = """
import signal, sys, threading, time
from megatron_laser.run.stop_signals import answering_signals
with answering_signals() as signals:
    signals.started_up() if {running} else None
    print("there", flush=True)
    lock = threading.Lock()
    lock.acquire()
    try:
        lock.acquire(timeout=60) if {running} else time.sleep(60)
    finally:
        if not {running}:
            time.sleep(60)  # it cannot be taken apart either
"""


def start(running):
    code = HANGS.format(running=running)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    return process


def test_a_later_signal_ends_the_process_with_its_number_but_one_that_is_passed_on_does_not():
    process = start(running=True)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)  # a warning of the scheduler was no first one
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    time.sleep(2.2)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert "SIGINT again: ended at once by a second signal; nothing was trained since the start" in errors
    assert "Traceback" not in errors and out.count("SIGUSR1: ") == 1


def test_nohup_keeps_its_word():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with answering_signals() as signals:
            signals.started_up()
            kill(signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not signals.reason

"""SIGTERM and SIGUSR1: all ranks stop after the same step and save; the same command continues. In each phase:
test_stop_phases.py."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.ranks import run_ranks, train_on_ranks
from helpers.tiny_run import end_session, metrics_without_times, start_run, write_tiny_run

from megatron_laser.distributed.coordinator import Coordinator
from megatron_laser.trainer.checkpoint import folder as folders

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("heard_signals")]

SCRIPT = Path(__file__).with_name("faulty_run.py")


@pytest.fixture(scope="module")
def run_two(tmp_path_factory):
    """(function that runs two ranks with a fault, output folder of an undisturbed run)."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"))

    def run(output, fault="none", rank=0, step=0, *more):
        return run_ranks(SCRIPT, 2, fault, str(rank), str(step), file, f"run.output_dir={output}", *more)

    run(file.parent / "undisturbed")
    return run, file.parent / "undisturbed"


@pytest.mark.parametrize("fault, rank", [("sigterm", 1), ("sigusr1", 0)])
def test_a_signal_to_one_rank_stops_both_after_the_step_and_the_run_continues_bitwise(
    run_two, tmp_path, fault, rank
):
    run, undisturbed = run_two
    out = tmp_path / "out"
    output = run(out, fault, rank, 3)
    stopped = json.loads((out / "STOPPED").read_text())
    # Rank 0 decides: it may have passed the end of step 3 before rank 1's request was in the store.
    assert stopped["reason"] == fault.upper() and stopped["step"] in (3, 4)
    assert f"stopped after step {stopped['step']} ({fault.upper()}); saved" in output
    assert [step for step, _ in folders.published(out / "checkpoints")] == [2, stopped["step"]]
    run(out)
    assert not (out / "STOPPED").exists()
    assert metrics_without_times(out) == metrics_without_times(undisturbed)


def test_sigusr2_to_one_rank_profiles_both_in_the_same_steps_and_changes_nothing(run_two, tmp_path):
    run, undisturbed = run_two
    out = tmp_path / "out"
    output = run(out, "sigusr2", 1, 2, "logging.profile={ranks: all, asked_steps: 1}")
    names = sorted(path.name for path in (out / "profile").iterdir())
    # Rank 0 decides: it may have passed the end of step 2 before rank 1's request was in the store.
    step = int(re.fullmatch(r"steps_(\d)-\1\.rank_0\.trace\.json\.gz", names[0])[1])
    assert step in (3, 4) and names[1:] == [f"steps_{step}-{step}.rank_1.trace.json.gz"]
    assert f"profiling steps {step} to {step} on all ranks: {out}/profile/steps_{step}-{step}.*" in output
    assert metrics_without_times(out) == metrics_without_times(undisturbed)
    assert not (out / "control").exists()


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_sigterm_from_outside_stops_the_run_which_then_continues(run_two, tmp_path, processes):
    """With torchrun the signal goes to its agent, which passes it on to its workers and then itself ends with 1.

    Alone, a signal is what test_resume.py is about.
    """
    file, out = write_tiny_run(tmp_path), tmp_path / "out"
    process = start_run(file, "run.steps=2000", "checkpoint.every=1000", processes=processes)
    try:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text().count("\n") > 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        end_session(process)
    assert process.returncode == (3 if processes == 1 else 1), output
    stopped = json.loads((out / "STOPPED").read_text())
    assert stopped["reason"] == "SIGTERM"
    assert [step for step, _ in folders.published(out / "checkpoints")] == [stopped["step"]]
    assert re.search(r"stopped after step \d+ \(SIGTERM\); saved", output)
    more = stopped["step"] + 1
    train_on_ranks(file, f"run.steps={more}", processes=processes)
    assert [line["step"] for line in metrics_without_times(out)] == list(range(1, more + 1))


def coordinators(deadline):
    store = dist.HashStore()
    return [Coordinator(store, rank, 2, deadline=deadline) for rank in range(2)]


def both(first, second):
    """Results of two functions that wait for each other."""
    results = [None, None]

    def run(index, work):
        try:
            results[index] = work()
        except RuntimeError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_a_request_on_any_rank_becomes_the_decision_of_all():
    pair = coordinators(5.0)
    assert both(*(lambda one=one: one.agree_to_stop(1) for one in pair)) == [None, None]
    pair[1].request_stop("SIGTERM")
    decisions = []
    for step in (2, 3):  # rank 0 may have decided on step 2 before it heard of the request
        decisions += both(*(lambda one=one, step=step: one.agree_to_stop(step) for one in pair))
        if decisions[-1] is not None:
            break
    assert decisions[-2:] == ["SIGTERM", "SIGTERM"]
    for one in pair:
        one.close()


@pytest.mark.parametrize("asked", [None, 0, 1])
def test_all_ranks_begin_or_none_does_whichever_was_asked_to_stop(asked):
    pair = coordinators(5.0)
    if asked is not None:
        pair[asked].request_stop("SIGINT")
    if asked == 1:  # it leaves by itself, as long as it has not said that it has started
        found = both(pair[0].agree_to_start, pair[1].stop_told)
        assert found == [False, None]
    else:
        assert both(*(one.agree_to_start for one in pair)) == [asked is None] * 2
    for one in pair:
        one.close()


def test_a_stop_that_is_not_acknowledged_by_all_is_an_error_that_names_the_rank():
    first, second = coordinators(1.0)
    first.request_stop("SIGTERM")
    with pytest.raises(
        RuntimeError, match=r"rank 1 did not acknowledge the stop after step 4 .*nothing was saved"
    ):
        first.agree_to_stop(4)
    first.close()
    second.close()

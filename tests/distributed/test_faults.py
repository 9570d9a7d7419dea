"""A rank dies, stops or hangs: the others end in time, and say which rank it was and in which phase."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.ranks import start_ranks
from helpers.tiny_run import metrics_without_times, write_tiny_run

from megatron_laser.trainer.checkpoint import folder as folders

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("faulty_run.py")
DEADLINE = 8.0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("run"))


def start(file, fault, rank, step, *overrides):
    """Two ranks without torchrun, whose agent would end the healthy rank before it can tell what it saw."""
    return start_ranks(SCRIPT, 2, fault, str(rank), str(step), file, *overrides)


def outcome(ranks, faulty):
    """(exit status, output) of the healthy rank."""
    healthy = ranks[1 - faulty]
    try:
        return healthy.wait(120), healthy.output
    finally:
        end(ranks)


def end(ranks):
    for rank in ranks:
        rank.end()


@pytest.mark.parametrize(
    "fault, verdict",
    [
        ("die", r"rank 1: no heartbeat for \d+ s, last phase 'train step 2"),
        pytest.param(
            "stop", r"rank 1: no heartbeat for \d+ s, last phase 'train step 2", marks=pytest.mark.long
        ),
        ("hang", r"rank 1: alive, in phase 'train step 2[^\n]* for \d+ s, at loop.py:\d+ \(run_step\)"),
    ],
)
def test_a_lost_rank_is_named_with_its_phase_and_the_other_rank_ends_in_time(file, tmp_path, fault, verdict):
    ranks = start(file, fault, 1, 2, f"run.output_dir={tmp_path / 'out'}", f"run.deadline={DEADLINE}")
    status, output = outcome(ranks, faulty=1)
    assert status != 0, output
    assert re.search(verdict, output), output
    assert "rank 0" in output and "train step 2" in output
    assert len(metrics_without_times(tmp_path / "out")) == 1


def test_a_rank_that_stops_while_rank_zero_works_alone_is_noticed_by_the_watchdog(file, tmp_path):
    ranks = start(
        file, "none", 1, 2, f"run.output_dir={tmp_path / 'out'}", "run.steps=400", f"run.deadline={DEADLINE}"
    )
    while not (tmp_path / "out" / "metrics.jsonl").exists():
        assert ranks[0].poll() is None, ranks[0].output
        time.sleep(0.2)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    status, output = outcome(ranks, faulty=1)
    assert time.monotonic() - started < DEADLINE + 30
    assert status != 0
    assert re.search(r"rank 1: no heartbeat for \d+ s, last phase '", output), output


def test_a_rank_zero_that_stops_is_noticed_by_the_others(file, tmp_path):
    ranks = start(file, "hang", 0, 2, f"run.output_dir={tmp_path / 'out'}", f"run.deadline={DEADLINE}")
    status, output = outcome(ranks, faulty=0)
    assert status != 0
    assert re.search(r"rank 0: alive, in phase 'train step 2[^\n]* at loop.py:\d+ \(run_step\)", output), (
        output
    )


def run_together(ranks):
    try:
        return [rank.wait(120) for rank in ranks], [rank.output for rank in ranks]
    finally:
        end(ranks)


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_leaves_the_last_checkpoint(file, tmp_path):
    out = tmp_path / "out"
    ranks = start(file, "full", 1, 3, f"run.output_dir={out}", "optimizer.distributed=true")
    statuses, outputs = run_together(ranks)
    assert statuses == [2, 2], outputs
    message = "rank 1: OSError: [Errno 28] No space left on device"
    assert f"error: all steps are done, but the last save failed: {message}" in outputs[0].splitlines()
    assert "Traceback" not in outputs[0] + outputs[1]
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_00000002"]
    folders.verify(out / "checkpoints" / "step_00000002")
    assert len(metrics_without_times(out)) == 4


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(file, tmp_path):
    out = tmp_path / "out"
    outcome(start(file, "die in save", 1, 4, f"run.output_dir={out}", f"run.deadline={DEADLINE}"), faulty=1)
    assert [step for step, _ in folders.published(out / "checkpoints")] == [2]
    statuses, outputs = run_together(start(file, "none", 0, 0, f"run.output_dir={out}"))
    assert statuses == [0, 0], outputs
    assert [step for step, _ in folders.published(out / "checkpoints")] == [2, 4]
    assert not list((out / "checkpoints").glob("*.partial"))


def test_a_damaged_checkpoint_is_one_line_on_rank_zero_whichever_rank_found_it(file, tmp_path):
    out = tmp_path / "out"
    statuses, outputs = run_together(start(file, "none", 0, 0, f"run.output_dir={out}", "run.steps=2"))
    assert statuses == [0, 0], outputs
    files = sorted(
        path for path in (out / "checkpoints" / "step_00000002").iterdir() if "distcp" in path.name
    )
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"?")
    statuses, outputs = run_together(start(file, "none", 0, 0, f"run.output_dir={out}"))
    assert statuses == [2, 2], outputs
    errors = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{files[0].name} is damaged" in errors[0]
    assert "Traceback" not in outputs[0] + outputs[1]


@pytest.mark.long
def test_other_data_are_one_line_on_rank_zero(tmp_path):
    file, out = write_tiny_run(tmp_path), tmp_path / "out"
    statuses, outputs = run_together(start(file, "none", 0, 0, f"run.output_dir={out}", "run.steps=2"))
    assert statuses == [0, 0], outputs
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("0 + 1", "1 + 0"))
    statuses, outputs = run_together(start(file, "none", 0, 0, f"run.output_dir={out}"))
    assert statuses == [2, 2], outputs
    assert "error: the saved data cursor belongs to another run over the data" in outputs[0]
    assert "Traceback" not in outputs[0] + outputs[1]

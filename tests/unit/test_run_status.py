"""status.json: whole at every moment, current without costing the loop anything, and nobody else's."""

import json
import signal
import time

from megatron_laser.run.status import STATUS, Status, StatusFile, read_status


def test_what_was_said_last_is_read_back(tmp_path):
    file = StatusFile(tmp_path, state="starting", steps=7, command="megatron-laser train run.yaml")
    assert read_status(tmp_path) == Status(**json.loads((tmp_path / STATUS).read_text()))
    file.close(state="stopped", step=3, checkpoint=3, reason="SIGTERM", exit_status=3)
    said = read_status(tmp_path)
    assert (said.state, said.step, said.steps, said.exit_status) == ("stopped", 3, 7, 3)
    assert said.ended and said.started <= said.time and said.time.endswith("Z")
    file.close(state="failed")  # the first counts
    assert read_status(tmp_path).state == "stopped"


def test_an_update_reaches_the_disk_soon_and_a_signal_handler_may_make_one(tmp_path):
    file = StatusFile(tmp_path, every=0.01)
    before = signal.signal(signal.SIGUSR1, lambda *_: file.update(state="stopping", reason="SIGUSR1"))
    try:
        with file._writing:  # as if the signal came while the file is being written
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    until = time.monotonic() + 10
    while read_status(tmp_path).state != "stopping":
        assert time.monotonic() < until
        time.sleep(0.01)
    file.close()


def test_a_folder_that_is_no_longer_the_runs_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    own = [True]
    file = StatusFile(folder, own=lambda: own[0])
    own[0] = False
    (folder / STATUS).write_text("another run's")
    file.close(state="failed")
    assert (folder / STATUS).read_text() == "another run's"
    (folder / STATUS).unlink()
    folder.rmdir()
    own[0] = True
    file.update(state="failed")
    file.flush()
    assert not folder.exists()


def test_nothing_and_nonsense_are_no_status(tmp_path):
    assert read_status(tmp_path) is None
    for content in ("", "[]", "7", '{"state": "asleep"}'):
        (tmp_path / STATUS).write_text(content)
        assert read_status(tmp_path) is None
    (tmp_path / STATUS).write_text('{"state": "running", "of a later version": 1}')
    assert read_status(tmp_path).state == "running"
